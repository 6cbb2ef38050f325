"""The planner against published runs: every row is rerun through the same door as a user's plan.

Errors are shown as they are. Nothing in the planner knows a row; tests/planner checks that. Constants were
fitted to rows.yaml; runs of examined.yaml showed missing terms, and one of them chose a factor; those of
held_out.yaml had no part in step times.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from moe.planner.hardware_file import find_gpu
from moe.planner.memory import GIB, memory_of_stages
from moe.planner.settings import Job, load_plan_config, make_job
from moe.planner.step import step_time

TABLES = ("rows", "examined", "held_out")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published run.

    Attributes:
        id: Number in the table of sources, and what was run.
        source: Who measured.
        config: Name of a model of this folder; empty if the run cannot be planned.
        gpu: Kind of GPU, or name of a hardware file of this folder.
        gpus: How many.
        overrides: What the run states.
        step_s: Measured seconds of a step; 0 if its speed was published as tokens.
        tokens_per_s_per_gpu: Measured speed; 0 if its step was published.
        memory_gib: Measured peak; 0 if unpublished.
        missing: Why it cannot be planned.
        assumes: What its source does not state, and the overrides do.
        repeats: Number of the fitted row with the same model, GPU, layout and precision; empty if none has.
        table: File that it is in.
    """

    id: str
    source: str
    config: str = ""
    gpu: str = ""
    gpus: int = 0
    overrides: tuple[str, ...] = ()
    step_s: float = 0.0
    tokens_per_s_per_gpu: float = 0.0
    memory_gib: float = 0.0
    missing: str = ""
    assumes: str = ""
    repeats: str = ""
    table: str = "rows"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row and what the planner says.

    Attributes:
        row: The run.
        job: As it was planned.
        measured_s: Its step.
        planned_s: The planner's.
        planned_gib: The planner's peak of the fullest rank.
        short_gib: What a GPU lacks by the planner, context and slack included: 0 if it is right, as all ran.
    """

    row: Row
    job: Job
    measured_s: float
    planned_s: float
    planned_gib: float
    short_gib: float

    @property
    def step_error(self) -> float:
        """Relative; positive is too slow."""
        return self.planned_s / self.measured_s - 1

    @property
    def memory_error(self) -> float | None:
        """Relative; None where memory is unpublished."""
        return self.planned_gib / self.row.memory_gib - 1 if self.row.memory_gib else None


def published_rows() -> tuple[Row, ...]:
    """All tables, in their order."""
    tables = {name: _read(name) for name in TABLES}
    stacks = tables["rows"]["stacks"]
    return tuple(_row({**row, "table": name}, stacks) for name in TABLES for row in tables[name]["rows"])


def published_config(name: str) -> Path:
    """The recipe of a published model, by file name."""
    return _folder() / f"{name}.yaml"


@cache
def validate() -> tuple[Comparison, ...]:
    """Plan every row of the first table that states all that a plan needs."""
    return tuple(one for one in compare_all() if one.row.table == "rows" and not one.row.assumes)


@cache
def compare_all() -> tuple[Comparison, ...]:
    """Plan every row that can be planned."""
    return tuple(_compare(row) for row in published_rows() if not row.missing)


def summary(comparisons: tuple[Comparison, ...]) -> dict[str, float | None]:
    """Median and worst errors; of memory, None where no row has it."""
    steps = [abs(comparison.step_error) for comparison in comparisons]
    memory = [abs(error) for c in comparisons if (error := c.memory_error) is not None]
    return {
        "rows": len(steps),
        "step_median_abs_error": statistics.median(steps),
        "step_worst_abs_error": max(steps),
        "memory_worst_abs_error": max(memory, default=None),
        "do_not_fit": sum(comparison.short_gib > 0 for comparison in comparisons),
    }


def _compare(row: Row) -> Comparison:
    config = load_plan_config(published_config(row.config), row.overrides)
    hardware = _folder() / f"{row.gpu}.yaml"
    job = make_job(config, row.gpus, find_gpu(str(hardware) if hardware.is_file() else row.gpu))
    speed = row.tokens_per_s_per_gpu * row.gpus
    memory = memory_of_stages(job)
    needed = max(stage.needed_bytes for stage in memory)
    return Comparison(
        row=row,
        job=job,
        measured_s=row.step_s or job.tokens_per_step / speed,
        planned_s=step_time(job).step_s,
        planned_gib=max(stage.total_bytes for stage in memory) / GIB,
        short_gib=max(0.0, needed - job.gpu.memory_bytes) / GIB,
    )


def _row(entry: dict[str, Any], stacks: dict[str, str]) -> Row:
    names = entry.pop("stacks", [])
    overrides = " ".join([*(stacks[name] for name in names), entry.pop("overrides", "")])
    return Row(**entry, overrides=tuple(overrides.split()))


def _read(name: str) -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    return table


def _folder() -> Path:
    return Path(str(resources.files("moe.planner"))) / "published"
