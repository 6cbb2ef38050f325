"""Clocks for pipeline stages that would only wait: each is slowed until it just keeps up with the slowest.

After Perseus (arXiv 2312.06902), which plans every forward and backward pass; here each stage gets one
clock, which an operator can lock. A stage that is slower also fills and drains the pipeline more slowly, so
the step is played out with the new times (moe.planner.schedule), and no more of the slack is used than the
allowed loss of speed leaves.

A pass of t seconds takes t * (compute * f_max / f + 1 - compute) at clock f: memory and links do not slow
down with it. Power is idle + (busy - idle) * (f / f_max)^3 while a stage works, idle while it waits: the
usual cubic law of clock and voltage. Joules of a plan are therefore predictions, and labelled so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe.errors import InputError
from moe.planner.layout import Layout
from moe.planner.schedule import timeline

BISECTIONS = 20


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What is known of a pipeline before it is changed.

    Attributes:
        layout: For pp and vpp.
        num_microbatches: Of a step.
        forward_s: Of one micro-batch on each stage, at the highest clock.
        backward_s: Likewise.
        basis: `measured` or `planned`, and by what.
    """

    layout: Layout
    num_microbatches: int
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    basis: str

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Forward and backward of one micro-batch on each stage."""
        return tuple(f + b for f, b in zip(self.forward_s, self.backward_s, strict=True))


@dataclass(frozen=True, kw_only=True)
class Clocks:
    """What the GPU's clock can be, and what it does to time and power.

    Attributes:
        grid_mhz: Clocks that can be locked, rising.
        compute_share: Of a pass at the highest clock, the part that slows down with the clock.
        busy_w: Of a GPU that works at the highest clock.
        idle_w: Of one that waits.
    """

    grid_mhz: tuple[int, ...]
    compute_share: float
    busy_w: float
    idle_w: float

    def stretch(self, mhz: int) -> float:
        """Time of a pass at a clock over that at the highest."""
        return self.compute_share * self.grid_mhz[-1] / mhz + 1 - self.compute_share

    def watts(self, mhz: int) -> float:
        """Power of a working GPU at a clock."""
        return self.idle_w + (self.busy_w - self.idle_w) * (mhz / self.grid_mhz[-1]) ** 3

    def lowest(self, stretch: float) -> int:
        """The lowest clock at which a pass is stretched by no more than this."""
        return next(mhz for mhz in self.grid_mhz if self.stretch(mhz) <= stretch * (1 + 1e-9))


@dataclass(frozen=True)
class StageClock:
    """One stage of a plan.

    Attributes:
        stage: From 0.
        clock_mhz: To be locked on its GPUs.
        busy_s: Forward and backward of a micro-batch, at the highest clock.
        slowed_s: The same at its clock, predicted.
    """

    stage: int
    clock_mhz: int
    busy_s: float
    slowed_s: float


@dataclass(frozen=True)
class ClockPlan:
    """Clocks of all stages and what they are expected to do.

    Attributes:
        basis: Where the times of the stages come from.
        stages: In order.
        step_s: Of the pipeline at the highest clock, played out.
        slowed_step_s: With the plan's clocks, played out.
        energy_ratio: Joules of the plan over those at the highest clock, predicted.
        max_slowdown: That was allowed.
        compute_share: That was assumed.
    """

    basis: str
    stages: tuple[StageClock, ...]
    step_s: float
    slowed_step_s: float
    energy_ratio: float
    max_slowdown: float
    compute_share: float

    def as_object(self) -> dict[str, Any]:
        """As plain values, of which a file is made."""
        return {"kind": "clock_plan", "schema_version": 1, "energy_is": "predicted", **asdict(self)}

    def as_text(self) -> str:
        """For a person."""
        lines = [
            f"stage {one.stage}: {one.clock_mhz} MHz, {one.busy_s:.4g} -> {one.slowed_s:.4g} s a micro-batch"
            for one in self.stages
        ]
        longer, joules = self.slowed_step_s / self.step_s - 1, self.energy_ratio - 1
        step = f"step {self.step_s:.4g} -> {self.slowed_step_s:.4g} s ({longer:+.2%})"
        return "\n".join([f"stage times: {self.basis}", *lines, f"{step}, joules {joules:+.1%}, predicted"])


def plan_clocks(stages: Stages, clocks: Clocks, *, max_slowdown: float) -> ClockPlan:
    """Slow each stage down until it just keeps up, as far as the step as a whole stays fast enough.

    Args:
        stages: The pipeline.
        clocks: Of its GPUs.
        max_slowdown: Share by which the step may get longer.

    Raises:
        InputError: There is one stage only, which never waits.
    """
    if stages.layout.pp < 2:
        raise InputError(f"parallel.pp={stages.layout.pp}: only pipelines have stages that wait")
    full_s = step_of(stages, [1.0] * stages.layout.pp)
    chosen = _chosen(stages, clocks, _largest_share(stages, clocks, full_s * (1 + max_slowdown)))
    stretches = [clocks.stretch(mhz) for mhz in chosen]
    slowed_s = step_of(stages, stretches)
    highest = [clocks.grid_mhz[-1]] * stages.layout.pp
    return ClockPlan(
        basis=stages.basis,
        stages=tuple(
            StageClock(stage, mhz, busy_s, busy_s * stretch)
            for stage, (mhz, busy_s, stretch) in enumerate(zip(chosen, stages.busy_s, stretches, strict=True))
        ),
        step_s=full_s,
        slowed_step_s=slowed_s,
        energy_ratio=_energy_j(stages, clocks, chosen, slowed_s) / _energy_j(stages, clocks, highest, full_s),
        max_slowdown=max_slowdown,
        compute_share=clocks.compute_share,
    )


def step_of(stages: Stages, stretches: Sequence[float]) -> float:
    """Seconds from the first pass of a step to the last, with the passes of each stage stretched."""
    forward_s = [time_s * stretch for time_s, stretch in zip(stages.forward_s, stretches, strict=True)]
    backward_s = [time_s * stretch for time_s, stretch in zip(stages.backward_s, stretches, strict=True)]
    spans = timeline(stages.layout, stages.num_microbatches, forward_s, backward_s)
    return max(span.end_s for span in spans)


def _chosen(stages: Stages, clocks: Clocks, share: float) -> list[int]:
    """Clocks that use a share of each stage's slack."""
    slowest_s = max(stages.busy_s)
    return [clocks.lowest(1 + share * (slowest_s / busy_s - 1)) for busy_s in stages.busy_s]


def _largest_share(stages: Stages, clocks: Clocks, allowed_s: float) -> float:
    """The most slack that can be used within the time: the less of it, the higher the clocks."""

    def fits(share: float) -> bool:
        stretches = [clocks.stretch(mhz) for mhz in _chosen(stages, clocks, share)]
        return step_of(stages, stretches) <= allowed_s * (1 + 1e-9)

    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _energy_j(stages: Stages, clocks: Clocks, chosen: Sequence[int], step_s: float) -> float:
    """Of a step, for one GPU of each stage."""
    return math.fsum(
        clocks.watts(mhz) * work_s + clocks.idle_w * (step_s - work_s)
        for mhz, busy_s in zip(chosen, stages.busy_s, strict=True)
        for work_s in [busy_s * clocks.stretch(mhz) * stages.num_microbatches]
    )
