"""All layouts of a job on so many GPUs: those that fit in memory, the best, and why its neighbours lose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from moe.config.rules import violations
from moe.errors import InputError
from moe.planner.memory import GIB, memory_of_stages
from moe.planner.plan import Plan, make_plan
from moe.planner.settings import Job, PlanConfig, check
from moe.planner.site import Site

Objective = Literal["time", "tokens_per_j"]
TENSOR = (1, 2, 4, 8)  # within a node: sequence-parallel traffic needs NVLink
MICRO_BATCHES = (1, 2, 4, 8)
CHUNKS = (1, 2, 4)  # of a pipeline rank
FRONT_LENGTH = 10


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A layout one change away from the best.

    Attributes:
        overrides: Its layout.
        verdict: Why it loses.
    """

    overrides: tuple[str, ...]
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found.

    Attributes:
        best: The winner.
        overrides: It as overrides for `moe train` and `moe plan`.
        front: Layouts that no other beats in time, tokens per joule and memory at once, best first.
        tried: Layouts that divide evenly.
        fitting: Those of them that fit in memory.
        neighbours: Changes of one axis.
        refused: Rules of `moe train` that the layout breaks today.
    """

    best: Plan
    overrides: tuple[str, ...]
    front: tuple[Plan, ...]
    tried: int
    fitting: int
    neighbours: tuple[Neighbour, ...]
    refused: tuple[str, ...]


def search(config: PlanConfig, base: Job, *, site: Site, objective: Objective = "time") -> Found:
    """Try every layout of `base`'s GPUs; the other assumptions stay.

    Raises:
        InputError: No layout divides evenly, or none fits; the text says how many bytes are missing.
    """
    jobs = list(_candidates(base))
    if not jobs:
        raise InputError(
            f"no layout of {base.layout.gpus} GPUs divides the model and "
            f"train.global_batch_size={base.global_batch}; change --gpus or the batch"
        )
    steps = config.train.steps
    fitting = [job for job in jobs if _short_bytes(job) <= 0]
    if not fitting:
        raise InputError(_nothing_fits(jobs))
    plans = [make_plan(job, steps, site) for job in fitting]
    plans.sort(key=_merit(objective))
    best = plans[0]
    return Found(
        best=best,
        overrides=as_overrides(best.job),
        front=tuple(_front(plans))[:FRONT_LENGTH],
        tried=len(jobs),
        fitting=len(fitting),
        neighbours=tuple(_neighbours(best, objective, site, steps)),
        refused=tuple(_refused(config, best.job)),
    )


def as_overrides(job: Job) -> tuple[str, ...]:
    """The layout as `moe train` takes it: every key that a recipe may have set otherwise."""
    layout = job.layout
    stages = ",".join(map(str, job.stage_layers))
    return (
        f"parallel.tp={layout.tp}",
        f"parallel.pp={layout.pp}",
        f"parallel.vpp={layout.vpp}",
        f"parallel.stage_layers=[{stages}]",
        f"parallel.ep={layout.ep}",
        f"parallel.etp={layout.etp}",
        f"parallel.cp={layout.cp}",
        f"train.micro_batch_size={job.micro_batch}",
    )


def _candidates(base: Job) -> Iterator[Job]:
    gpus, shape = base.layout.gpus, base.shape
    for tp in TENSOR:
        for pp in _divisors(gpus // tp if gpus % tp == 0 else 0, most=shape.num_layers):
            for ep in _divisors(shape.num_experts, most=gpus):
                for vpp, micro in product(CHUNKS if pp > 1 else (1,), MICRO_BATCHES):
                    layout = replace(base.layout, tp=tp, pp=pp, vpp=vpp, ep=ep)
                    # A split of layers over chunks fits one number of them only.
                    job = replace(base, layout=layout, micro_batch=micro, stage_layers=())
                    if not check(job):
                        yield job


def _divisors(number: int, *, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def _short_bytes(job: Job) -> float:
    needed = max(stage.needed_bytes for stage in memory_of_stages(job))
    return needed - job.gpu.memory_bytes


def _nothing_fits(jobs: list[Job]) -> str:
    closest = min(jobs, key=_short_bytes)
    short = round(_short_bytes(closest))
    return (
        f"none of {len(jobs)} layouts fits on {closest.layout.gpus} {closest.gpu.name}: the nearest, "
        f"{' '.join(as_overrides(closest))}, is short by {short:,} bytes ({short / GIB:.1f} GiB) a GPU; "
        "use more GPUs, plan.recompute=[full], or plan.grads=bf16 plan.moments=bf16"
    )


def _merit(objective: Objective) -> Callable[[Plan], float]:
    def key(plan: Plan) -> float:
        return plan.time.step_s if objective == "time" else -plan.energy.tokens_per_j

    return key


def _front(plans: list[Plan]) -> Iterator[Plan]:
    """Plans that no other equals or beats in every respect (Pareto)."""

    def scores(plan: Plan) -> tuple[float, float, float]:
        return plan.time.step_s, -plan.energy.tokens_per_j, plan.fullest.total_bytes

    kept: list[tuple[float, float, float]] = []
    for plan in sorted(plans, key=scores):
        mine = scores(plan)
        if not any(all(a <= b for a, b in zip(other, mine, strict=True)) for other in kept):
            kept.append(mine)
            yield plan


def _neighbours(best: Plan, objective: Objective, site: Site, steps: int) -> Iterator[Neighbour]:
    job = best.job
    changes = [
        replace(job, layout=replace(job.layout, **{axis: size}))
        for axis in ("tp", "pp", "vpp", "ep")
        for size in _near(getattr(job.layout, axis))
    ] + [replace(job, micro_batch=size) for size in _near(job.micro_batch)]
    for other in changes:
        yield Neighbour(overrides=as_overrides(other), verdict=_verdict(best, other, objective, site, steps))


def _near(size: int) -> list[int]:
    return [size * 2, *([size // 2] if size % 2 == 0 else [])]


def _verdict(best: Plan, other: Job, objective: Objective, site: Site, steps: int) -> str:
    problems = check(other)
    if problems:
        return problems[0]
    short = round(_short_bytes(other))
    if short > 0:
        return f"short by {short:,} bytes of memory a GPU"
    plan = make_plan(other, steps, site)
    slower = plan.time.step_s / best.time.step_s - 1
    ours = best.time.spent.parts
    growth = {cause: seconds - ours[cause] for cause, seconds in plan.time.spent.parts.items()}
    cause = max(growth, key=growth.__getitem__)
    energy = 1 - plan.energy.tokens_per_j / best.energy.tokens_per_j
    lead = f"{slower:+.1%} time" if objective == "time" else f"{-energy:+.1%} tokens/J"
    return f"{lead}, most by {cause.removesuffix('_s')} ({growth[cause]:+.3g} s)"


def _refused(config: PlanConfig, job: Job) -> Iterator[str]:
    """What `moe train` would say to the layout, on as many ranks."""
    values = dict(_leaves(config.model_dump(), ""))
    values |= {
        "parallel.tp": job.layout.tp,
        "parallel.pp": job.layout.pp,
        "parallel.vpp": job.layout.vpp,
        "parallel.ep": job.layout.ep,
        "parallel.etp": job.layout.etp,
        "parallel.cp": job.layout.cp,
        "parallel.stage_layers": job.stage_layers,
        "train.micro_batch_size": job.micro_batch,
    }
    for violation in violations(values, job.layout.gpus):
        yield violation.message


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Values by dotted key."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
