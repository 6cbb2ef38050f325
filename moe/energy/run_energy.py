"""The energy of one run over all its starts, from its folder: what was spent when, and what of it was lost.

Reads the journal (energy.jsonl), which survives kills, and report.json where the run reached its end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.config import load_config
from moe.energy.carbon import Span
from moe.errors import InputError
from moe.metering.boundaries import Level
from moe.metering.energy import VALIDITIES
from moe.metering.journal import JOURNAL_FILE, read_journal
from moe.metering.report import read_report
from moe.train.folder import CONFIG_FILE, REPORT_FILE

Line = dict[str, Any]

# The boundaries that PUE multiplies: all IT equipment of the job.
IT_BOUNDARY = "fabric"


@dataclass(frozen=True)
class StartEnergy:
    """One start of a run, from its first line in the journal to the next start's.

    Attributes:
        number: From 1.
        begin_s: Seconds since 1970, UTC.
        end_s: Of its last line.
        first_step: Steps done as it began.
        last_step: Done when it ended.
        tokens: Trained on in between.
        energy_j: All that it spent; None where the meter failed.
        useful_j: Of that, what steps took that led to the run's newest state.
        spans: The same joules by time.
        ended: It ended by itself; False: it was killed, or it still runs.
    """

    number: int
    begin_s: float
    end_s: float
    first_step: int
    last_step: int
    tokens: int
    energy_j: float | None
    useful_j: float | None
    spans: tuple[Span, ...]
    ended: bool


@dataclass(frozen=True)
class RunEnergy:
    """All starts of a run.

    Attributes:
        name: Of the run.
        folder: Of the run.
        starts: In order.
        tokens: That the newest state was trained on.
        source: How the joules were obtained.
        boundary: What they include.
        validity: The worst of all starts, each as its last line says: none is checked in its first minute.
        levels: Of report.json: the boundaries around the meter's; empty before the run's end.
        finished: The run reached its end.
    """

    name: str
    folder: Path
    starts: tuple[StartEnergy, ...]
    tokens: int
    source: str
    boundary: str
    validity: str
    levels: tuple[Level, ...]
    finished: bool

    @property
    def energy_j(self) -> float | None:
        """Joules of all starts, lost work included."""
        return total([start.energy_j for start in self.starts])

    @property
    def useful_j(self) -> float | None:
        """Joules of the steps that led to the newest state."""
        return total([start.useful_j for start in self.starts])

    @property
    def spans(self) -> tuple[Span, ...]:
        """All joules by time."""
        return tuple(span for start in self.starts for span in start.spans)

    @property
    def it_level(self) -> Level | None:
        """The joules of all IT equipment, which PUE multiplies; None where only the meter's are known."""
        own = next((level for level in self.levels if level.boundary in (IT_BOUNDARY, "facility")), None)
        return None if own is None or own.energy_j is None else own


def read_run_energy(run_dir: Path) -> RunEnergy:
    """Read a run's folder.

    Raises:
        InputError: It holds no journal, or a damaged one, or its starts were metered in different ways.
    """
    if not (run_dir / JOURNAL_FILE).exists():
        raise InputError(f"{run_dir} has no {JOURNAL_FILE}; is it the folder of a run that did a step?")
    lines = read_journal(run_dir)
    if not lines:
        raise InputError(f"{run_dir / JOURNAL_FILE} is empty")
    kinds = {(line["source"], line["boundary"]) for line in lines if line["source"] is not None}
    if len(kinds) != 1:
        raise InputError(
            f"{run_dir}: the starts were metered in different ways ({sorted(kinds)}), "
            "so their joules have no sum"
        )
    ((source, boundary),) = kinds
    report = read_report(run_dir / REPORT_FILE) if (run_dir / REPORT_FILE).exists() else None
    # A run that was given more steps after its report has newer lines than the report knows of.
    current = report is not None and report.steps == lines[-1]["step"]
    config = load_config(run_dir / CONFIG_FILE, world_size=None)
    return RunEnergy(
        name=config.run.name,
        folder=run_dir,
        starts=tuple(_starts(lines)),
        tokens=int(lines[-1]["tokens"] or 0),
        source=source,
        boundary=boundary,
        validity=_validity(lines),
        levels=report.energy.levels if report is not None and current else (),
        finished=current,
    )


def _validity(lines: Sequence[Line]) -> str:
    last = {line["start"]: line["validity"] or "unchecked" for line in lines}
    return max(last.values(), key=VALIDITIES.index)


def _starts(lines: Sequence[Line]) -> list[StartEnergy]:
    groups = [list(group) for _, group in itertools.groupby(lines, key=lambda line: line["start"])]
    # What was useful in the end: a later start that resumes from an older state takes back what came after.
    states_j = [group[0]["useful_j"] for group in groups[1:]] + [groups[-1][-1]["useful_j"]]
    begun_j = groups[0][0]["useful_j"]
    starts = []
    for i, group in enumerate(groups):
        following = groups[i + 1][0] if i + 1 < len(groups) else None
        kept_j = _least(states_j[i:])
        useful_j = None if kept_j is None or begun_j is None else kept_j - begun_j
        starts.append(_start(group, following, useful_j))
        begun_j = kept_j
    return starts


def _least(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if len(known) == len(values) else None


def _start(group: Sequence[Line], following: Line | None, useful_j: float | None) -> StartEnergy:
    """One start; what it spent after its last line is in the line with which the next one begins."""
    first, last = group[0], group[-1]
    spans = [_span(before, after, after["time_s"]) for before, after in itertools.pairwise(group)]
    if following is not None:
        # It was spent while this start still ran, not in the pause before the next.
        more_s = max(0.0, (following["wall_s"] or 0.0) - (last["wall_s"] or 0.0))
        spans.append(_span(last, following, min(following["time_s"], last["time_s"] + more_s)))
    known = [span for span in spans if span is not None]
    whole = len(known) == len(spans)
    return StartEnergy(
        number=first["start"],
        begin_s=first["time_s"],
        end_s=last["time_s"],
        first_step=first["step"],
        last_step=last["step"],
        tokens=(last["tokens"] or 0) - (first["tokens"] or 0),
        energy_j=math.fsum(span.energy_j for span in known) if whole else None,
        useful_j=useful_j,
        spans=tuple(known),
        ended=last["event"] == "end",
    )


def _span(before: Line, after: Line, end_s: float) -> Span | None:
    if before["energy_j"] is None or after["energy_j"] is None:
        return None
    return Span(before["time_s"], max(end_s, before["time_s"]), after["energy_j"] - before["energy_j"])


def total(values: Sequence[float | None]) -> float | None:
    """Their sum; None as soon as one of them is unknown."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None
