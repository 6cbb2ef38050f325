"""Pictures of a plan: memory of each stage, the time of a step, the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe.planner.memory import GIB
from moe.planner.plan import Plan
from moe.planner.report import CAUSES
from moe.planner.schedule import timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Paul Tol's muted palette, which colour-blind readers can tell apart, and greys for the small parts.
COLOURS = (
    "#332288",
    "#88CCEE",
    "#44AA99",
    "#117733",
    "#999933",
    "#DDCC77",
    "#CC6677",
    "#882255",
    "#AA4499",
    "#BBBBBB",
    "#777777",
    "#444444",
)


def draw_plan(plan: Plan, front: Sequence[Plan], folder: Path) -> list[Path]:
    """Write memory.png, step.png and, after a search, pareto.png.

    Returns:
        The files written.
    """
    figures = {"memory.png": _memory_figure(plan), "step.png": _step_figure(plan)}
    if front:
        figures["pareto.png"] = _front_figure(front)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in figures]


def _figure(width: float, height: float) -> Figure:
    # Figure, not pyplot: pyplot keeps figures in a global and looks for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _memory_figure(plan: Plan) -> Figure:
    """A bar of parts for each stage, against what the GPU has."""
    figure = _figure(9, 4.5)
    axes = figure.subplots()
    stages = [stage.stage for stage in plan.memory]
    below = [0.0] * len(stages)
    for colour, part in zip(COLOURS, plan.memory[0].parts, strict=False):
        heights = [stage.parts[part] / GIB for stage in plan.memory]
        if any(heights):
            axes.bar(stages, heights, bottom=below, label=part, color=colour)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.axhline(plan.job.gpu.memory_bytes / GIB, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="pipeline stage", ylabel="GiB on its fullest GPU", xticks=stages)
    axes.set_title(f"Memory on {plan.job.gpu.name}; dashed: what it has")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def _step_figure(plan: Plan) -> Figure:
    """Above, the causes on the slowest stage; below, each stage's forward (light) and backward passes."""
    figure = _figure(9, 3.2 + 0.16 * len(plan.memory))
    causes, stages = figure.subplots(2, height_ratios=(1, 1 + 0.25 * len(plan.memory)), sharex=True)
    start = 0.0
    for colour, (cause, seconds) in zip(COLOURS, plan.time.spent.parts.items(), strict=False):
        if seconds:
            share = seconds / plan.time.step_s
            causes.barh(0, seconds, left=start, color=colour, label=f"{CAUSES[cause]} {share:.0%}")
        start += seconds
    causes.set(yticks=[], xlim=(0, start))
    causes.set_title(f"A step of {plan.time.step_s:.3f} s: causes on the slowest stage, work of every stage")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    for (stage, is_backward), ranges in _work(plan).items():
        colour = COLOURS[11] if is_backward else COLOURS[9]
        stages.broken_barh(ranges, (stage - 0.4, 0.8), color=colour, linewidth=0)
    stages.set(xlabel="s", ylabel="pipeline stage")
    stages.invert_yaxis()
    return figure


def _work(plan: Plan) -> dict[tuple[int, bool], list[tuple[float, float]]]:
    """(start, length) of the passes of each stage, forward and backward apart."""
    time = plan.time
    forward_s = [s * share for s, share in zip(time.microbatch_s, time.forward_share, strict=True)]
    backward_s = [s - forward for s, forward in zip(time.microbatch_s, forward_s, strict=True)]
    ranges: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    for span in timeline(plan.job.layout, plan.job.num_microbatches, forward_s, backward_s):
        key = span.work.stage, span.work.is_backward
        ranges.setdefault(key, []).append((span.start_s, span.end_s - span.start_s))
    return ranges


def _front_figure(front: Sequence[Plan]) -> Figure:
    figure = _figure(6.5, 4.5)
    axes = figure.subplots()
    axes.scatter([plan.time.step_s for plan in front], [plan.energy.tokens_per_j for plan in front])
    for plan in front:
        layout = plan.job.layout
        axes.annotate(
            f"tp{layout.tp} pp{layout.pp} ep{layout.ep} b{plan.job.micro_batch}",
            (plan.time.step_s, plan.energy.tokens_per_j),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set(xlabel="s a step", ylabel="tokens/J (GPU boards)", title="Layouts that no other beats")
    return figure
