"""Whether a counter and an independent power trace of the same devices agree.

Each device is judged for itself, because in the sum of eight a counter that is off by a fifth would pass. The
comparison is left open until its own errors are small: the counter is late by up to 0.1 s at each end and a
power reading is the mean of the second before it, together 1.2 % of CHECK_WINDOW_S at most.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe.metering.device_trace import DeviceTrace, PowerTrace
from moe.metering.energy import VALIDITIES, Audit, Boundary, Validity

MAX_DISAGREEMENT = 0.03
CHECK_WINDOW_S = 60.0
# Of the time, for the trace to speak for the whole of it.
MIN_COVERED = 0.9


def audit_counters(devices: Sequence[DeviceTrace], *, now_s: float, power_boundary: Boundary) -> Audit:
    """Compare counters with power traces; the worst device speaks for all.

    A counter is documented to count the GPU. Where power can be read of the whole module only (Grace), the
    two need not agree: the counter must stay below the module. If it equals the module's energy it counts
    the module, and the label `gpu` is wrong.

    Args:
        devices: What was sampled.
        now_s: The end of the window, on the clock of the samples.
        power_boundary: What a power reading includes, `gpu` or `module`.
    """
    verdicts = [_judge(device, now_s, power_boundary) for device in devices]
    validity, detail = max(verdicts, key=lambda verdict: VALIDITIES.index(verdict[0]))
    if validity == "checked":
        worst = max(devices, key=lambda device: abs(_difference(device)))
        detail = (
            f"counter and power trace agree on each of {len(devices)} device(s); worst: {_figures(worst)}"
        )
    return Audit(
        validity=validity,
        detail=detail,
        counter_j=sum(device.compared_j for device in devices),
        trace_j=sum(device.power.energy_j for device in devices),
        window_s=min(device.power.covered_s for device in devices),
    )


def audit_power(traces: Sequence[tuple[str, PowerTrace]], *, now_s: float, opened_s: float) -> Audit:
    """Judge energy that was integrated from power alone: time without samples is guessed, not measured."""
    name, missing_s = max(
        ((name, trace.missing_until(now_s)) for name, trace in traces), key=lambda item: item[1]
    )
    elapsed_s = max(now_s - opened_s, 1e-9)
    if missing_s > MAX_DISAGREEMENT * elapsed_s:
        return Audit(
            validity="invalid",
            detail=f"{name}: power was not sampled for {missing_s:.1f} of {elapsed_s:.1f} s",
        )
    return Audit(validity="unchecked", detail="integrated power alone; no second instrument")


def _judge(device: DeviceTrace, now_s: float, power_boundary: Boundary) -> tuple[Validity, str]:
    power = device.power
    if power.covered_s < CHECK_WINDOW_S:
        return "unchecked", (
            f"compared over {power.covered_s:.1f} s; counter and power trace need {CHECK_WINDOW_S:g} s to be "
            f"told from their quantisation ({_figures(device)})"
        )
    difference, figures = _difference(device), _figures(device)
    if difference > MAX_DISAGREEMENT:
        return "invalid", f"the counter counts more than the power trace: {figures}"
    if power_boundary == "module":
        return _judge_in_module(difference, figures)
    if difference < -MAX_DISAGREEMENT:
        return "invalid", f"the counter counts less than the power trace: {figures}"
    missing_s = power.missing_until(now_s)
    if missing_s > (1 - MIN_COVERED) * (missing_s + power.covered_s):
        return "unchecked", f"power was not sampled for {missing_s:.1f} s; of the rest, {figures}"
    return "checked", figures


def _judge_in_module(difference: float, figures: str) -> tuple[Validity, str]:
    if difference < -MAX_DISAGREEMENT:
        return "unchecked", f"only the module's power can be read, which contains the GPU's: {figures}"
    return "invalid", f"the counter counts the whole module, not the GPU alone: {figures}"


def _difference(device: DeviceTrace) -> float:
    return device.compared_j / device.power.energy_j - 1 if device.power.energy_j > 0 else 0.0


def _figures(device: DeviceTrace) -> str:
    return (
        f"{device.counter.name}: counter {device.compared_j:,.1f} J, power trace "
        f"{device.power.energy_j:,.1f} J over {device.power.covered_s:,.1f} s ({_difference(device):+.1%})"
    )
