"""All layouts of a job on so many GPUs: those that fit in memory, the best, and why its neighbours lose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from moe.config.rules import violations
from moe.config.schema import RunConfig
from moe.errors import InputError
from moe.planner.layout import Layout
from moe.planner.memory import GIB, memory_of_stages
from moe.planner.plan import Plan, make_plan
from moe.planner.settings import Job, check
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
        front: Layouts that no other beats in time, tokens per joule and memory at once, best first; without
            those that are refused, unless all are.
        tried: Layouts that divide evenly.
        fitting: Those of them that fit in memory.
        neighbours: Changes of one axis.
        refused: Why `moe train` does not take the layout today; empty if any layout that fits is taken.
    """

    best: Plan
    overrides: tuple[str, ...]
    front: tuple[Plan, ...]
    tried: int
    fitting: int
    neighbours: tuple[Neighbour, ...]
    refused: tuple[str, ...]


def search(config: RunConfig, base: Job, *, site: Site, objective: Objective = "time") -> Found:
    """Try every layout of `base`'s GPUs, its own among them; the other assumptions stay.

    Layouts that `moe train` refuses, or whose save a host cannot hold, come after all others.

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
        raise InputError(_nothing_fits(config, jobs))
    plans = [make_plan(job, steps, site, engine=config.engine.name) for job in fitting]
    taken = [plan for plan in plans if not _refused(config, plan)] or plans
    taken.sort(key=_merit(objective))
    best = taken[0]
    return Found(
        best=best,
        overrides=as_overrides(config, best.job),
        front=tuple(_front(taken))[:FRONT_LENGTH],
        tried=len(jobs),
        fitting=len(fitting),
        neighbours=tuple(_neighbours(config, best, objective)),
        refused=_refused(config, best),
    )


def as_overrides(config: RunConfig, job: Job) -> tuple[str, ...]:
    """The layout as `moe train` takes it: every key that a recipe may have set otherwise.

    Evaluation must fill the ranks as a step does: where the recipe's would not, it is made longer.
    """
    layout = job.layout
    stages = ",".join(map(str, job.stage_layers))
    evaluated = _eval_sequences(config, job)
    longer = () if evaluated == config.train.eval_sequences else (f"train.eval_sequences={evaluated}",)
    return (
        f"parallel.tp={layout.tp}",
        f"parallel.pp={layout.pp}",
        f"parallel.vpp={layout.vpp}",
        f"parallel.stage_layers=[{stages}]",
        f"parallel.ep={layout.ep}",
        f"parallel.etp={layout.etp}",
        f"parallel.cp={layout.cp}",
        f"train.micro_batch_size={job.micro_batch}",
        *longer,
    )


def _eval_sequences(config: RunConfig, job: Job) -> int:
    """Those of the recipe, or as many more as fill every rank, and every round of a pipeline with chunks."""
    layout = job.layout
    # A neighbour may ask for more ranks than there are.
    whole = job.micro_batch * max(1, layout.dp) * (layout.pp if layout.vpp > 1 else 1)
    return -(-config.train.eval_sequences // whole) * whole


def _candidates(base: Job) -> Iterator[Job]:
    gpus, shape = base.layout.gpus, base.shape
    if not check(base):
        yield base  # as the recipe has it
    for tp in TENSOR:
        for pp in _divisors(gpus // tp if gpus % tp == 0 else 0, most=shape.num_layers):
            for ep in _divisors(shape.num_experts, most=gpus):
                for vpp, micro in product(CHUNKS if pp > 1 else (1,), MICRO_BATCHES):
                    layout = replace(base.layout, tp=tp, pp=pp, vpp=vpp, ep=ep)
                    for split in _splits(base, layout):
                        job = replace(base, layout=layout, micro_batch=micro, stage_layers=split)
                        if job != base and not check(job):
                            yield job


def _splits(base: Job, layout: Layout) -> set[tuple[int, ...]]:
    """The balanced split of layers, and the recipe's own for as many chunks as it is for."""
    same = (layout.pp, layout.vpp) == (base.layout.pp, base.layout.vpp)
    return {(), base.stage_layers} if same else {()}


def _divisors(number: int, *, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def _short_bytes(job: Job) -> float:
    needed = max(stage.needed_bytes for stage in memory_of_stages(job))
    return needed - job.gpu.memory_bytes


def _nothing_fits(config: RunConfig, jobs: list[Job]) -> str:
    closest = min(jobs, key=_short_bytes)
    short, layout = round(_short_bytes(closest)), " ".join(as_overrides(config, closest))
    return (
        f"none of {len(jobs)} layouts fits on {closest.layout.gpus} {closest.gpu.name}: the nearest, "
        f"{layout}, is short by {short:,} bytes ({short / GIB:.1f} GiB) a GPU; "
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


def _neighbours(config: RunConfig, best: Plan, objective: Objective) -> Iterator[Neighbour]:
    job = best.job
    changes = [
        # A split of layers fits one number of chunks only.
        replace(
            job,
            layout=replace(job.layout, **{axis: size}),
            stage_layers=job.stage_layers if axis in ("tp", "ep") else (),
        )
        for axis in ("tp", "pp", "vpp", "ep")
        for size in _near(getattr(job.layout, axis))
    ] + [replace(job, micro_batch=size) for size in _near(job.micro_batch)]
    for other in changes:
        verdict = _verdict(config, best, other, objective)
        yield Neighbour(overrides=as_overrides(config, other), verdict=verdict)


def _near(size: int) -> list[int]:
    return [size * 2, *([size // 2] if size % 2 == 0 else [])]


def _verdict(config: RunConfig, best: Plan, other: Job, objective: Objective) -> str:
    problems = check(other)
    if problems:
        return problems[0]
    short = round(_short_bytes(other))
    if short > 0:
        return f"short by {short:,} bytes of memory a GPU"
    plan = make_plan(other, config.train.steps, best.site, engine=config.engine.name)
    refused = _refused(config, plan)
    if refused:
        return refused[0]
    slower = plan.time.step_s / best.time.step_s - 1
    ours = best.time.spent.parts
    growth = {cause: seconds - ours[cause] for cause, seconds in plan.time.spent.parts.items()}
    cause = max(growth, key=growth.__getitem__)
    energy = 1 - plan.energy.tokens_per_j / best.energy.tokens_per_j
    lead = f"{slower:+.1%} time" if objective == "time" else f"{-energy:+.1%} tokens/J"
    return f"{lead}, most by {cause.removesuffix('_s')} ({growth[cause]:+.3g} s)"


def _refused(config: RunConfig, plan: Plan) -> tuple[str, ...]:
    """What `moe train` would say to the layout, on as many ranks; and that a host is too small for a save."""
    job = plan.job
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
        "train.eval_sequences": _eval_sequences(config, job),
    }
    reasons = tuple(violation.message for violation in violations(values, job.layout.gpus))
    if plan.save_bytes is not None and plan.save_bytes > plan.host_bytes:
        needed, there = plan.save_bytes / GIB, plan.host_bytes / GIB
        reasons += (f"a checkpoint takes {needed:,.1f} GiB of each host's {there:,.0f} while it is written",)
    return reasons


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Values by dotted key."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
