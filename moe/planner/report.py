"""Plans, comparisons and searches as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from rich.console import Console
from rich.table import Table

from moe.planner.memory import GIB, StageMemory
from moe.planner.plan import ADVICE, Plan, as_json
from moe.planner.search import Found
from moe.planner.step import Spent
from moe.planner.validate import Comparison, Row, summary

WIDTH = 110
CAUSES = {
    "math_s": "matrix products",
    "memory_s": "streaming kernels",
    "launch_s": "waiting for Python",
    "tp_s": "tensor-parallel exchange",
    "ep_s": "expert exchange",
    "pp_s": "pipeline transfers",
    "bubble_s": "pipeline bubble",
    "dp_s": "gradients and weights",
    "optimizer_s": "optimizer",
}
# Rows of the first table: key of the JSON object, and its unit, to which a prefix of the SI is added.
_FIGURES = (
    ("params_total", "parameters"),
    ("params_active", "active parameters"),
    ("params_active_no_embedding", "active without embedding"),
    ("flops_per_token", "FLOP a token"),
    ("step_s", "s a step"),
    ("tokens_per_s_per_gpu", "tokens/s a GPU"),
    ("tflops_per_gpu", "TFLOP/s a GPU"),
    ("memory_gib_worst_rank", "GiB on the fullest GPU"),
    ("exposed_comm_s", "s exposed communication"),
    ("energy_j_per_step", "J a step (GPU boards)"),
    ("tokens_per_j", "tokens/J (GPU boards)"),
)
_PREFIXES = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"), (1.0, ""), (1e-3, " m"), (1e-6, " u"))


def plan_text(plan: Plan) -> str:
    """Figures with their evidence, the step by cause, memory by part, the whole run."""
    return render(
        _figures(plan), _time_table(plan), _memory_table(plan), _campaign_table(plan), _verdict(plan)
    )


def search_text(found: Found) -> str:
    """The winner, the front, and why neighbours lose."""
    front = Table("layout", "s a step", "tokens/J", "GiB", title="Pareto front", title_justify="left")
    for plan in found.front:
        layout = plan.job.layout
        front.add_row(
            f"tp {layout.tp}  pp {layout.pp}x{layout.vpp}  ep {layout.ep}  batch {plan.job.micro_batch}",
            f"{plan.time.step_s:.3f}",
            f"{plan.energy.tokens_per_j:.3f}",
            f"{plan.fullest.total_bytes / GIB:.1f}",
        )
    lose = Table("neighbour", "why it loses", title="Neighbours", title_justify="left")
    for neighbour in found.neighbours:
        lose.add_row(" ".join(neighbour.overrides), neighbour.verdict)
    lines = [f"{found.fitting} of {found.tried} layouts fit. Use: {' '.join(found.overrides)}"]
    lines += [f"moe train refuses it today: {reason}" for reason in found.refused]
    return "\n".join([plan_text(found.best), render(front, lose), *lines])


def what_if_text(base: Plan, others: Sequence[tuple[str, Plan]]) -> str:
    """Changes of speed, energy and memory, one row a change."""
    table = Table("change", "s a step", "tokens/J", "GiB", title="What if", title_justify="left")
    for override, plan in others:
        table.add_row(
            override,
            _change(plan.time.step_s, base.time.step_s),
            _change(plan.energy.tokens_per_j, base.energy.tokens_per_j),
            _change(plan.fullest.total_bytes / GIB, base.fullest.total_bytes / GIB),
        )
    return render(table)


def validation_text(comparisons: Sequence[Comparison], rows: Sequence[Row]) -> str:
    """Every published row: measured, planned, error; and the rows that cannot be planned."""
    kinds = {
        "rows": [one for one in comparisons if one.row.table == "rows" and not one.row.assumes],
        "rows that assume what is not published": [one for one in comparisons if one.row.assumes],
        "runs held out": [one for one in comparisons if one.row.table == "held_out"],
        "runs that showed missing terms": [one for one in comparisons if one.row.table == "examined"],
    }
    lines = [f"{row.id}: not rerun, {row.missing}" for row in rows if row.missing]
    lines += [f"{one.row.id}: assumes {one.row.assumes}" for one in comparisons if one.row.assumes]
    lines += [
        f"{one.row.id}: row {one.row.repeats} in another release" for one in comparisons if one.row.repeats
    ]
    lines += [
        f"{one.row.id}: ran, but is short by {one.short_gib:.1f} GiB here"
        for one in comparisons
        if one.short_gib
    ]
    lines += [_summary_line(kind, alike) for kind, alike in kinds.items() if alike]
    tables = [_comparison_table(kind, alike) for kind, alike in kinds.items() if alike]
    return "\n".join([render(*tables), *lines])


def _comparison_table(kind: str, comparisons: Sequence[Comparison]) -> Table:
    table = Table("published run", "measured s", "planned s", "error", "GiB", "planned", "error")
    table.title, table.title_justify = kind, "left"
    for comparison in comparisons:
        memory = comparison.memory_error
        table.add_row(
            comparison.row.id,
            f"{comparison.measured_s:.3f}",
            f"{comparison.planned_s:.3f}",
            f"{comparison.step_error:+.1%}",
            "" if memory is None else f"{comparison.row.memory_gib:.2f}",
            "" if memory is None else f"{comparison.planned_gib:.2f}",
            "" if memory is None else f"{memory:+.1%}",
        )
    return table


def _summary_line(kind: str, comparisons: Sequence[Comparison]) -> str:
    numbers = summary(tuple(comparisons))
    median, worst = numbers["step_median_abs_error"], numbers["step_worst_abs_error"]
    text = f"{numbers['rows']:.0f} {kind}: step time median |error| {median:.1%}, worst {worst:.1%}"
    memory = numbers["memory_worst_abs_error"]
    return text if memory is None else f"{text}; memory worst {memory:.1%}"


def render(*parts: Any) -> str:
    """Rich tables as plain text of a fixed width."""
    console = Console(width=WIDTH, force_terminal=False, color_system=None, markup=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return captured.get().rstrip()


def _figures(plan: Plan) -> Table:
    job, values = plan.job, as_json(plan)
    layout = job.layout
    title = (
        f"{layout.gpus} {job.gpu.name}, {job.precision}, {job.plan.routing} routing: tp {layout.tp}, "
        f"pp {layout.pp} x {layout.vpp}, ep {layout.ep} x {layout.etp}, cp {layout.cp}, dp {layout.dp}; "
        f"{job.num_microbatches} micro-batches of {job.micro_batch} x {job.seq_length}"
    )
    table = Table("figure", "value", "from", "to", "evidence", title=title, title_justify="left")
    for key, unit in _FIGURES:
        proof = values["evidence"][key]
        table.add_row(unit, *map(_short, (values[key], proof["low"], proof["high"])), proof["level"])
    return table


def _short(value: float) -> str:
    """Four digits and a prefix of the SI: 32.86 G."""
    scale, prefix = next(((s, p) for s, p in _PREFIXES if abs(value) >= s), (1.0, ""))
    return f"{value / scale:.4g}{prefix}"


def _time_table(plan: Plan) -> Table:
    table = Table("a step", "s", "share", title="Time", title_justify="left")
    for field in fields(Spent):
        seconds = getattr(plan.time.spent, field.name)
        if seconds:
            table.add_row(CAUSES[field.name], f"{seconds:.3f}", f"{seconds / plan.time.step_s:.1%}")
    return table


def _memory_table(plan: Plan) -> Table:
    """First, fullest and last stage."""
    shown = {stage.stage: stage for stage in (plan.memory[0], plan.fullest, plan.memory[-1])}
    stages = [shown[index] for index in sorted(shown)]
    heads = [f"stage {stage.stage}" for stage in stages]
    table = Table("GiB a GPU", *heads, title="Memory", title_justify="left")
    for field in fields(StageMemory):
        if field.name != "stage" and any(getattr(stage, field.name) for stage in stages):
            table.add_row(field.name, *(f"{getattr(stage, field.name) / GIB:.2f}" for stage in stages))
    table.add_row("tensors in all", *(f"{stage.total_bytes / GIB:.2f}" for stage in stages))
    table.add_row("with context and slack", *(f"{stage.needed_bytes / GIB:.2f}" for stage in stages))
    return table


def _campaign_table(plan: Plan) -> Table:
    run, energy, site = plan.campaign, plan.energy, plan.site
    table = Table("the whole run", "", title=f"Run at {site.name}, PUE {site.pue}", title_justify="left")
    facts = (
        ("tokens", f"{run.tokens / 1e12:,.3f} T"),
        ("days", f"{run.days:,.1f} at goodput {run.goodput:.1%}"),
        ("GPU-hours", f"{run.gpu_hours:,.0f}"),
        ("interruption every", f"{run.mtbf_h:,.1f} h"),
        ("checkpoint every", f"{run.checkpoint_interval_s:,.0f} s, {run.checkpoint_s:,.1f} s to write"),
        ("power", f"{energy.facility_w / 1e6:,.2f} MW, {energy.gpu_w:,.0f} W a GPU board"),
        ("energy", f"{run.mwh:,.0f} MWh, {energy.tokens_per_j_facility:.3f} tokens/J at the facility"),
        ("CO2", f"{run.t_co2:,.0f} t at {site.grid_g_per_kwh:.0f} g/kWh"),
        ("cost", f"{run.yen / 1e6:,.0f} million yen"),
    )
    for name, value in facts:
        table.add_row(name, value)
    table.add_row("assumed", f"{', '.join(site.assumed)}: no source states them for {site.name}")
    if run.site_gpus:
        table.add_row("site's power", f"{run.site_gpus:,} GPUs, {run.site_days:,.1f} days with all of them")
    return table


def _verdict(plan: Plan) -> str:
    lines = [f"Attack next: {ADVICE[plan.attack]}.", *_host_lines(plan)]
    if plan.short_bytes:
        lines.append(
            f"DOES NOT FIT: short by {plan.short_bytes:,} bytes on each GPU of stage {plan.fullest.stage}."
        )
    return "\n".join(lines)


def _host_lines(plan: Plan) -> Iterator[str]:
    """A save gathers the optimizer state of all that a rank holds in the memory of its host."""
    if plan.save_bytes is None:
        return
    needed, there = plan.save_bytes / GIB, plan.host_bytes / GIB
    text = f"A checkpoint takes {needed:,.1f} GiB of memory on each host while it is written"
    if needed <= there:
        yield f"{text}, of {there:,.0f} GiB."
    else:
        yield f"{text}, MORE THAN ITS {there:,.0f} GiB: use a larger parallel.pp, parallel.ep or parallel.tp."


def _change(value: float, before: float) -> str:
    return f"{value:,.3f} ({value / before - 1:+.1%})"
