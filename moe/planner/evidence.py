"""How far each figure can be trusted: exact, calibrated or extrapolated, with an interval.

exact: arithmetic on sizes. calibrated: published runs on this GPU with these kernels and this precision
exist, and the interval reaches to the farthest that they and the fitted runs of the GPU lie from their plans.
extrapolated: no such run; the interval is that of all runs on the GPU, widened by rules that stand here.
Nothing the planner prints is measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from moe.planner.settings import Job
from moe.planner.validate import Comparison, compare_all

EXACT = frozenset({"params_total", "params_active", "params_active_no_embedding", "flops_per_token"})
SPEEDS = frozenset({"tokens_per_s_per_gpu", "tflops_per_gpu", "tokens_per_j"})  # more is less time
ENERGY = frozenset({"energy_j_per_step", "tokens_per_j"})
# Factor on the worst error of a kind of GPU where no run is alike, and what natural routing adds: half of
# the 8-20 % by which published runs with and without forced balance differ.
UNLIKE = 2.0
NATURAL = 0.08
# Half-widths. Two runs publish their memory, both without a pipeline.
MEMORY_CALIBRATED, MEMORY_EXTRAPOLATED = 0.02, 0.10
# The power model was set by two measured dense runs; published node models err by 11 % (arXiv 2506.14551).
POWER = 0.10
FAR = 4  # times the GPUs of the largest published run


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Of one figure.

    Attributes:
        level: exact, calibrated or extrapolated.
        low: Lower end of the interval.
        high: Upper end.
    """

    level: str
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Where the truth may lie, in parts of what is planned.

    Attributes:
        alike: Published runs are alike.
        low: At most 1.
        high: At least 1.
    """

    alike: bool
    low: float
    high: float


def evidence(job: Job, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The evidence of every figure."""
    time, memory = time_reach(job), memory_reach(job)
    return {
        name: asdict(_of_figure(name, value, values["step_s"], memory if name.startswith("memory") else time))
        for name, value in values.items()
    }


def _of_figure(name: str, value: float, step_s: float, reach: Reach) -> Evidence:
    if name in EXACT:
        return Evidence(level="exact", low=value, high=value)
    level = "calibrated" if reach.alike else "extrapolated"
    if name == "exposed_comm_s":
        # No run publishes it: all that a step is off by may be communication, also where none is planned.
        low, high = value - (1 - reach.low) * step_s, value + (reach.high - 1) * step_s
        return Evidence(level="extrapolated", low=max(0.0, low), high=high)
    low, high = reach.low, reach.high
    if name in ENERGY:
        level, low, high = "extrapolated", low * (1 - POWER), high * (1 + POWER)
    if name in SPEEDS:
        low, high = 1 / high, 1 / low
    return Evidence(level=level, low=value * low, high=value * high)


def time_reach(job: Job) -> Reach:
    """Of a step, from measured over planned time of published runs."""
    rows = [one for one in compare_all() if not one.row.assumes]
    of_gpu = [one for one in rows if one.job.gpu == job.gpu]
    alike = [one for one in of_gpu if _is_alike(one.job, job)]
    if alike and job.plan.routing == "balanced":
        fitted = [one for one in of_gpu if one.row.table == "rows"]
        low, high = _ends(one.measured_s / one.planned_s for one in [*alike, *fitted])
        return Reach(alike=True, low=low, high=high)
    low, high = _ends(one.measured_s / one.planned_s for one in of_gpu or rows)
    natural = NATURAL if job.plan.routing == "natural" else 0.0
    return Reach(
        alike=False, low=1 / (1 + UNLIKE * (1 / low - 1) + natural), high=1 + UNLIKE * (high - 1) + natural
    )


def memory_reach(job: Job) -> Reach:
    """Of the fullest rank. Memory depends on kernels and layout, not on the kind of GPU."""
    alike = [one for one in compare_all() if _keeps_alike(one, job)]
    low, high = _ends(one.row.memory_gib / one.planned_gib for one in alike)
    least = MEMORY_CALIBRATED if alike else MEMORY_EXTRAPOLATED
    return Reach(alike=bool(alike), low=min(low, 1 - least), high=max(high, 1 + least))


def _ends(ratios: Iterable[float]) -> tuple[float, float]:
    """The least and the largest, 1 among them."""
    found = [1.0, *ratios]
    return min(found), max(found)


def _is_alike(run: Job, job: Job) -> bool:
    return (
        job.plan.is_te
        and _kinds(run) == _kinds(job)
        and (run.layout.cp > 1) == (job.layout.cp > 1)
        and job.layout.gpus <= FAR * run.layout.gpus
    )


def _keeps_alike(one: Comparison, job: Job) -> bool:
    if one.memory_error is None or not job.plan.is_te:
        return False
    run = one.job
    return (
        _kinds(run) == _kinds(job)
        and _axes(run) == _axes(job)
        and run.recompute == job.recompute
        and run.zero == job.zero
    )


def _kinds(job: Job) -> tuple[object, ...]:
    """What has kernels, and errors, of its own; a dense model is described as one of a single expert."""
    shape = job.shape
    experts = job.expert_precision, job.wide_into_activation, shape.expert_bias, shape.num_experts == 1
    return job.precision, job.muon, *experts


def _axes(job: Job) -> tuple[bool, ...]:
    layout = job.layout
    return tuple(size > 1 for size in (layout.tp, layout.pp, layout.ep, layout.etp, layout.cp))
