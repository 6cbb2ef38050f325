"""How far each figure can be trusted: exact, measured, calibrated or extrapolated, with an interval.

exact: arithmetic on sizes. calibrated: published runs on this kind of GPU with these kernels and this
precision exist, and the interval is the worst error the planner makes on them. extrapolated: no such run;
the interval is wider, by rules that stand here. Nothing the planner prints is measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moe.planner.settings import Job
from moe.planner.validate import Comparison, compare_all, validate

EXACT = frozenset({"params_total", "params_active", "params_active_no_embedding", "flops_per_token"})
# Factors on the worst error of a kind of GPU where no run is alike, and what natural routing adds: half of
# the 8-20 % by which published runs with and without forced balance differ.
UNLIKE = 2.0
NATURAL = 0.08
MEMORY_CALIBRATED, MEMORY_EXTRAPOLATED = 0.02, 0.10
# The power model reproduces two measured dense runs; published node models err by 11 % (arXiv 2506.14551).
POWER = 0.10
FAR = 4  # times the GPUs of the largest published run


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Of one figure.

    Attributes:
        level: exact, measured, calibrated or extrapolated.
        low: Lower end of the interval.
        high: Upper end.
    """

    level: str
    low: float
    high: float


def evidence(job: Job, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The evidence of every figure."""
    return {name: asdict(_of_figure(job, name, value)) for name, value in values.items()}


def _of_figure(job: Job, name: str, value: float) -> Evidence:
    if name in EXACT:
        return Evidence(level="exact", low=value, high=value)
    alike, error = _time_error(job)
    if name == "memory_gib_worst_rank":
        alike, error = _memory_error(job)
    elif name in ("energy_j_per_step", "tokens_per_j"):
        alike, error = False, error + POWER
    level = "calibrated" if alike else "extrapolated"
    return Evidence(level=level, low=value * (1 - error), high=value * (1 + error))


def _time_error(job: Job) -> tuple[bool, float]:
    """(whether published runs are alike, relative half-width)."""
    of_gpu = [row for row in compare_all() if row.row.gpu == job.gpu.name and not row.row.assumes]
    alike = [row for row in of_gpu if _is_alike(row, job)]
    fitted = [row for row in validate() if row.row.gpu == job.gpu.name]
    worst = max(abs(row.step_error) for row in [*alike, *(fitted or validate())])
    natural = NATURAL if job.plan.routing == "natural" else 0.0
    return bool(alike) and not natural, worst * (1 if alike else UNLIKE) + natural


def _is_alike(comparison: Comparison, job: Job) -> bool:
    run = comparison.job
    return (
        job.plan.is_te
        and job.precision == run.precision
        and job.shape.expert_bias
        == run.shape.expert_bias  # kernels of biased experts have errors of their own
        and job.layout.gpus <= FAR * run.layout.gpus
    )


def _memory_error(job: Job) -> tuple[bool, float]:
    calibrated = job.plan.is_te and any(row.memory_error is not None for row in validate())
    return calibrated, MEMORY_CALIBRATED if calibrated else MEMORY_EXTRAPOLATED
