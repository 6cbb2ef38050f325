"""What the meters of several machines say together, for the report of one job."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from moe.metering.boundaries import Level
from moe.metering.energy import Audit
from moe.metering.report import CrossCheck, Spread

# The joules of a start are unsure by up to one step of a counter; asked at the end of the run, for at its
# beginning any step is a large part of the total.
MAX_STEP = 0.03


def steps_of_starts(steps_j: Sequence[float]) -> float:
    """By how many joules the sum over the starts of a run is unsure: by one step of the counters for each.

    A start too short to see its counters step is as unsure as the one that saw the largest step.

    Args:
        steps_j: The largest step in each start, summed over machines; infinite where a counter did not move,
            NaN where nobody kept it.

    Returns:
        Infinite if a counter did not move and no start saw one move.
    """
    seen_j = [step_j for step_j in steps_j if math.isfinite(step_j) and step_j > 0]
    unseen_j = max(seen_j, default=math.inf if math.inf in steps_j else 0.0)
    return sum(step_j if math.isfinite(step_j) else unseen_j for step_j in steps_j)


def too_coarse(unsure_j: float, total_j: float) -> str | None:
    """What is wrong with the counters of a run; None if they were fine enough.

    Args:
        unsure_j: As of `steps_of_starts`.
        total_j: What they counted over all starts.
    """
    if unsure_j <= MAX_STEP * total_j or math.isnan(total_j):
        return None
    return (
        f"the counter is too coarse for this run: {total_j:.6g} J in all, unsure by {unsure_j:.6g} J, "
        f"where {MAX_STEP:.0%} are allowed"
    )


def node_level(
    description: str | None, audits: Sequence[Audit], node_j: float, *, unsure_j: float
) -> Level | None:
    """The level of whole machines; None if no instrument measures them.

    Args:
        description: Of the instruments.
        audits: Of each of them.
        node_j: Their joules over all starts; NaN where unknown.
        unsure_j: As of `too_coarse`.
    """
    if description is None:
        return None
    invalid = [audit.detail for audit in audits if audit.validity == "invalid"]
    coarse = too_coarse(unsure_j, node_j)
    if coarse is not None:
        invalid.append(coarse)
    if invalid or not math.isfinite(node_j):
        why = invalid[0] if invalid else "it failed, or an earlier start had none"
        return Level(boundary="node", basis="unknown", source=f"unknown: {description}: {why}", energy_j=None)
    return Level(boundary="node", basis="measured", source=description, energy_j=node_j)


def sum_of_checks(audits: Sequence[Audit]) -> CrossCheck | None:
    """Both instruments over all machines; None where one has no second instrument."""
    counters_j = [audit.counter_j for audit in audits if audit.counter_j is not None]
    traces_j = [audit.trace_j for audit in audits if audit.trace_j is not None]
    if not audits or len(counters_j) < len(audits) or len(traces_j) < len(audits):
        return None
    window_s = min(audit.window_s for audit in audits)
    return CrossCheck(counter_j=sum(counters_j), trace_j=sum(traces_j), window_s=window_s)


def spread_of(devices: Sequence[Sequence[str]], joules: Sequence[Sequence[float]]) -> Spread | None:
    """How unequal the devices of all machines are; None where one tells none apart or its meter failed.

    Args:
        devices: Names, by machine.
        joules: Of each of them, in the same order.
    """
    names = [name for of_machine in devices for name in of_machine]
    energies_j = [energy_j for of_machine in joules for energy_j in of_machine]
    if not names or len(names) != len(energies_j):
        return None
    by_name = list(zip(energies_j, names, strict=True))
    (min_j, min_device), (max_j, max_device) = min(by_name), max(by_name)
    return Spread(
        devices=len(by_name),
        min_j=min_j,
        median_j=statistics.median(energies_j),
        max_j=max_j,
        min_device=min_device,
        max_device=max_device,
    )
