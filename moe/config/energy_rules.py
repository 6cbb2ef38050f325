"""Rules about energy; rules.py says what a rule is."""

from __future__ import annotations

from collections.abc import Callable

Check = tuple[tuple[str, ...], Callable[..., str | None]]


def _power(full_w: float, idle_w: float) -> str | None:
    if full_w >= idle_w:
        return None
    return (
        f"energy.full_w_per_cpu={full_w:g} is below energy.idle_w_per_cpu={idle_w:g}; "
        "a busy CPU draws no less than an idle one"
    )


def _command(meter: str, node_command: tuple[str, ...]) -> str | None:
    if meter != "command" or node_command:
        return None
    return (
        "energy.meter=command needs energy.node_command: the program, with its arguments, that prints the "
        "watts or joules of a machine"
    )


def _pue(pue: float, source: str) -> str | None:
    if 0 < pue < 1:
        return f"energy.pue={pue:g} is below 1, less than the IT equipment alone; give 0 where it is unknown"
    if pue > 0 and not source.strip():
        return f"energy.pue={pue:g} needs energy.pue_source: who states it, and for when"
    if pue == 0 and source.strip():
        return f"energy.pue_source={source} is given without energy.pue; add it"
    return None


ENERGY_CHECKS: tuple[Check, ...] = (
    (("energy.full_w_per_cpu", "energy.idle_w_per_cpu"), _power),
    (("energy.meter", "energy.node_command"), _command),
    (("energy.pue", "energy.pue_source"), _pue),
)
