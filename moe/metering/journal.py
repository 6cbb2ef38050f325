"""`energy.jsonl` of a run folder: what was spent when, over all starts. Lines are only ever added.

`metrics.jsonl` loses the steps that are done again after a crash; the joules that they took stay here, with
the time of day that a grid's hourly factors need. One line at the beginning and the end of each start, and
between them one a second at most, and one where the validity changes:

    step       done so far
    event      start, step, end
    start      number of the start, from 1
    time_s     seconds since 1970, UTC
    energy_j   joules of the run so far, over all machines and starts; null from where a meter failed
    node_j     the same from an instrument of whole machines (energy.node_command); null without one
    useful_j   joules so far of the steps that led to the state of this line
    tokens     trained on so far
    wall_s     seconds in the training loop so far
    source, boundary, validity    see moe.metering.energy
    gpus, machines    of this start; in its first line only
    counter_step_j, node_counter_step_j    largest step of the operator's counters in this start, summed over
               machines; null where one has not moved, absent where there is none

Joules never fall from one line to the next. What a killed start spent after its last line is in the line with
which the next one begins, as far as `metrics.jsonl` had it: at most the step under way is lost.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.durable import write_atomically
from moe.metering.jsonl import read_step_log
from moe.metering.report import Report

JOURNAL_FILE = "energy.jsonl"
PERIOD_S = 1.0

_IF_KNOWN = ("gpus", "machines", "counter_step_j", "node_counter_step_j")
# Of a step's record in metrics.jsonl, by the names there.
_FROM_RECORD = {
    "step": "step",
    "energy_j": "energy_j",
    "node_j": "node_j",
    "useful_j": "useful_j",
    "tokens": "tokens",
    "wall_s": "wall_s",
    "source": "energy_source",
    "boundary": "energy_boundary",
    "validity": "energy_validity",
}


class EnergyJournal:
    """Writes the journal; a sink of the training loop."""

    def __init__(self, run_dir: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Continue the folder's journal, or begin it.

        Args:
            run_dir: The run folder.
            clock: Seconds since 1970.

        Raises:
            InputError: It is damaged.
        """
        self._path = run_dir / JOURNAL_FILE
        self._clock = clock
        earlier = read_step_log(self._path) if self._path.exists() else []
        self.number = max((entry.get("start", 0) for entry in earlier), default=0) + 1
        self._written_s = -math.inf
        self._validity: str | None = None
        self._cut_short = self._path.exists() and not self._path.read_bytes().endswith(b"\n")

    def start(self, config: Mapping[str, Any], total_steps: int) -> None:
        """Do nothing: `open` has what a start begins with."""

    def open(self, record: Mapping[str, Any]) -> None:
        """Write where this start begins; the fields are those of a step's record."""
        if self._cut_short:
            # The line that a crash cut short is dropped, as every reader does.
            entries = read_step_log(self._path)
            write_atomically(self._path, "".join(json.dumps(entry) + "\n" for entry in entries))
        self._write("start", record)

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one step of metrics.jsonl; a change of validity is written at once."""
        if self._clock() - self._written_s >= PERIOD_S or record.get("energy_validity") != self._validity:
            self._write("step", record)

    def end(self, record: Mapping[str, Any]) -> None:
        """Write what this start came to, its last checkpoint included."""
        self._write("end", record)

    def finish(self, report: Report | None) -> None:
        """Do nothing: every line is on its way to the disk when it is written."""

    def _write(self, event: str, record: Mapping[str, Any]) -> None:
        self._written_s = self._clock()
        self._validity = record.get("energy_validity")
        values = {name: record.get(key) for name, key in _FROM_RECORD.items()}
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        known = {name: record[name] for name in _IF_KNOWN if name in record}
        entry = {"event": event, "start": self.number, "time_s": self._written_s} | finite | known
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Starts:
    """All starts of a run, as its journal tells them.

    Attributes:
        number: How many.
        problem: Why the sum of their joules is not to be quoted; None if nothing speaks against it.
        sizes: GPUs and machines that any of them had; None for both where a start did not say.
        steps_j: Of each, in order, the largest steps of the operator's counters: of the job's meter, and of
            whole machines. Infinite where one did not move, NaN where the journal has none.
    """

    number: int
    problem: str | None
    sizes: frozenset[tuple[int | None, int | None]] = frozenset()
    steps_j: tuple[tuple[float, float], ...] = ()


def starts_of(entries: Sequence[Mapping[str, Any]]) -> Starts:
    """Count the starts, and find those whose joules do not belong in one sum."""
    last = {entry["start"]: entry for entry in entries}  # a later line of a start replaces the one before
    problem = None
    kinds = {(entry["boundary"], entry["source"] == "estimated") for entry in last.values()}
    invalid = [start for start, entry in last.items() if entry["validity"] == "invalid"]
    if len(kinds) > 1:
        labels = dict.fromkeys(f"{entry['source']} of {entry['boundary']}" for entry in last.values())
        problem = f"the starts of this run measured different things: {', '.join(labels)}"
    elif invalid:
        problem = f"the energy of start {invalid[0]} was invalid"
    sizes = {(entry.get("gpus"), entry.get("machines")) for entry in entries if entry.get("event") == "start"}
    steps_j = tuple(
        (_step_j(entry, "counter_step_j"), _step_j(entry, "node_counter_step_j")) for entry in last.values()
    )
    return Starts(number=len(last), problem=problem, sizes=frozenset(sizes), steps_j=steps_j)


def _step_j(entry: Mapping[str, Any], name: str) -> float:
    step_j = entry.get(name, math.nan)
    return math.inf if step_j is None else float(step_j)


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    """Every line of a run's journal.

    Raises:
        InputError: There is none, or it is damaged.
    """
    return read_step_log(run_dir / JOURNAL_FILE)
