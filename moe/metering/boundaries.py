"""The joules of a job at every boundary from its meter outwards, each measured, estimated or unknown.

What is not measured is added to what is, from stated constants: hosts and network as constant power a GPU,
cooling as the site's PUE. What no constant is stated for is unknown, and so is every boundary around it.

The config's defaults are ratings, not typical loads, so that an estimate flatters nobody. `host_w_per_gpu`:
an H100 node is rated at 10.2 kW, of which eight boards have 5.6 (1.82 times the boards; data sheet of the DGX
H100); the most that was seen in training is 8.4 kW, 350 W a GPU (arXiv 2412.08602). `fabric_w_per_gpu`:
2.01 kW of switches and optics for a node of eight, which an MLPerf Training 4.0 submitter derives from data
sheets for eight nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe.metering.energy import Boundary
from moe.metering.finite import Measured

Basis = Literal["measured", "estimated", "unknown"]
Sentence = Annotated[str, Field(min_length=1)]

_OUTWARDS: tuple[Boundary, ...] = ("node", "fabric", "facility")


class Level(BaseModel):
    """Gross joules at one boundary.

    Attributes:
        boundary: What is included.
        basis: `measured` only if every part of it is.
        source: Which meter or constants, in words.
        energy_j: Joules; None where unknown, or where the meter failed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    boundary: Boundary
    basis: Basis
    source: Sentence
    energy_j: Measured

    @model_validator(mode="after")
    def _unknown_has_no_figure(self) -> Self:
        if self.basis == "unknown" and self.energy_j is not None:
            raise ValueError(f"boundary {self.boundary} is unknown and yet has {self.energy_j} J")
        return self


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What surrounds the meter of a job.

    Attributes:
        num_gpus: Of the job.
        num_machines: Of the job.
        wall_s: How long it ran.
        host_w_per_gpu: CPU, memory, NICs, fans and power supplies of a node, in watts for each of its GPUs.
        fabric_w_per_gpu: Switches and optics between nodes, likewise.
        pue: Facility energy over that of IT equipment; 0 where unknown.
        pue_source: Who says so.
        gpus_vary: Whether starts of the run had different numbers of GPUs: no constant a GPU covers them all.
        machines_vary: Likewise of machines.
    """

    num_gpus: int
    num_machines: int
    wall_s: float
    host_w_per_gpu: float
    fabric_w_per_gpu: float
    pue: float
    pue_source: str
    gpus_vary: bool = False
    machines_vary: bool = False


def stack_levels(inner: Level, around: Surroundings, *, node: Level | None = None) -> tuple[Level, ...]:
    """The meter's level and every one outside it, up to the facility.

    Args:
        inner: What the job's meter says.
        around: What is not in it.
        node: What an instrument of whole machines says, where there is one beside the meter.
    """
    levels = [inner]
    for boundary in _around_boundary(inner.boundary):
        if boundary == "node":
            levels.append(_node(inner, around) if node is None else _not_below(inner, node))
        elif boundary == "fabric":
            levels.append(_fabric(levels[-1], around))
        else:
            levels.append(_facility(levels[-1], around))
    return tuple(levels)


def check_order(levels: tuple[Level, ...]) -> None:
    """Raise ValueError unless the levels go outwards one by one, and end at the facility."""
    names = tuple(level.boundary for level in levels)
    if not names or names[1:] != _around_boundary(names[0]):
        raise ValueError(
            f"boundaries {', '.join(names) or 'are missing'}; needed: the meter's and all around it, "
            f"in the order {', '.join(_OUTWARDS)}"
        )


def _around_boundary(boundary: Boundary) -> tuple[Boundary, ...]:
    return _OUTWARDS[_OUTWARDS.index(boundary) + 1 :] if boundary in _OUTWARDS else _OUTWARDS


def _not_below(inner: Level, node: Level) -> Level:
    """The measured machine, unless it took less than what is measured inside it."""
    node_j, inner_j = node.energy_j, inner.energy_j
    if node_j is None or inner_j is None or inner.basis != "measured" or node_j >= inner_j:
        return node
    return _unknown(
        "node", f"{node_j:.6g} J ({node.source}), but {inner_j:.6g} J of {inner.boundary} inside it"
    )


def _node(inner: Level, around: Surroundings) -> Level:
    if inner.boundary not in ("gpu", "module"):
        return _unknown("node", f"no constant makes a machine of {inner.boundary}; give energy.node_command")
    if around.gpus_vary:
        return _unknown(
            "node", "the starts of the run had different numbers of GPUs; give energy.node_command"
        )
    host_j = around.host_w_per_gpu * around.num_gpus * around.wall_s
    twice = ", the module's CPU counted twice" if inner.boundary == "module" else ""
    return _around(
        inner,
        boundary="node",
        energy_j=None if inner.energy_j is None else inner.energy_j + host_j,
        source=f"{inner.boundary} + {around.host_w_per_gpu:g} W of host a GPU (energy.host_w_per_gpu{twice})",
    )


def _fabric(inner: Level, around: Surroundings) -> Level:
    if around.machines_vary or (around.gpus_vary and around.num_machines > 1):
        return _unknown("fabric", "the starts of the run had different numbers of GPUs or machines")
    if around.num_machines == 1:
        return Level(
            boundary="fabric",
            basis=inner.basis,
            energy_j=inner.energy_j,
            source="one machine: no network between nodes",
        )
    if around.num_gpus == 0:
        return _unknown("fabric", "no constant is stated for the network of machines without GPUs")
    fabric_j = around.fabric_w_per_gpu * around.num_gpus * around.wall_s
    return _around(
        inner,
        boundary="fabric",
        energy_j=None if inner.energy_j is None else inner.energy_j + fabric_j,
        source=f"node + {around.fabric_w_per_gpu:g} W of network a GPU (energy.fabric_w_per_gpu)",
    )


def _facility(inner: Level, around: Surroundings) -> Level:
    if around.pue == 0:
        return _unknown("facility", "the site's PUE is not given (energy.pue)")
    return _around(
        inner,
        boundary="facility",
        energy_j=None if inner.energy_j is None else inner.energy_j * around.pue,
        source=f"fabric x PUE {around.pue:g} ({around.pue_source})",
    )


def _around(inner: Level, *, boundary: Boundary, energy_j: float | None, source: str) -> Level:
    if inner.basis == "unknown":
        return _unknown(boundary, f"{inner.boundary} is unknown")
    return Level(boundary=boundary, basis="estimated", source=source, energy_j=energy_j)


def _unknown(boundary: Boundary, why: str) -> Level:
    return Level(boundary=boundary, basis="unknown", source=f"unknown: {why}", energy_j=None)
