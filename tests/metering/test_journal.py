"""The journal of joules over all starts of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe.errors import InputError
from moe.metering.journal import JOURNAL_FILE, PERIOD_S, EnergyJournal, read_journal, starts_of


def record(step: int, energy_j: float) -> dict[str, Any]:
    labels = {"energy_source": "estimated", "energy_boundary": "node", "energy_validity": "unchecked"}
    return labels | {"step": step, "energy_j": energy_j, "useful_j": energy_j / 2, "tokens": 8, "wall_s": 1.0}


def test_lines_have_the_time_of_day_and_every_label(tmp_path: Path) -> None:
    journal = EnergyJournal(tmp_path, clock=lambda: 1_795_000_000.0)
    journal.open(record(0, 0.0))
    journal.end(record(4, 40.0))
    first, last = read_journal(tmp_path)
    assert first["event"] == "start"
    assert last == {
        "event": "end",
        "start": 1,
        "time_s": 1_795_000_000.0,
        "step": 4,
        "energy_j": 40.0,
        "node_j": None,
        "useful_j": 20.0,
        "tokens": 8,
        "wall_s": 1.0,
        "source": "estimated",
        "boundary": "node",
        "validity": "unchecked",
    }


def test_at_most_one_step_a_second_is_written(tmp_path: Path) -> None:
    now_s = [100.0]
    journal = EnergyJournal(tmp_path, clock=lambda: now_s[0])
    journal.open(record(0, 0.0))
    for step in range(1, 101):
        now_s[0] += PERIOD_S / 10
        journal.log(record(step, float(step)))
    assert 9 <= len(read_journal(tmp_path)) - 1 <= 10


def test_starts_add_up_and_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    EnergyJournal(tmp_path).open(record(0, 0.0))
    with (tmp_path / JOURNAL_FILE).open("a") as file:
        file.write('{"event": "step", "st')
    second = EnergyJournal(tmp_path)
    second.open(record(0, 3.0))
    second.end(record(2, float("nan")))
    entries = read_journal(tmp_path)
    assert [(entry["start"], entry["event"]) for entry in entries] == [
        (1, "start"),
        (2, "start"),
        (2, "end"),
    ]
    assert entries[-1]["energy_j"] is None
    assert (tmp_path / JOURNAL_FILE).read_text().count("\n") == 3


def test_starts_have_the_sizes_that_they_began_with(tmp_path: Path) -> None:
    for gpus in (8, 16, 16):
        journal = EnergyJournal(tmp_path)
        journal.open(record(0, 0.0) | {"gpus": gpus, "machines": 2})
        journal.end(record(2, 3.0))
    assert starts_of(read_journal(tmp_path)).sizes == {(8, 2), (16, 2)}


def test_steps_of_counters_are_kept_by_start(tmp_path: Path) -> None:
    for counters in ({"counter_step_j": 5.0}, {"counter_step_j": None, "node_counter_step_j": 7.0}, {}):
        journal = EnergyJournal(tmp_path)
        journal.open(record(0, 0.0))
        journal.end(record(2, 3.0) | counters)
    steps_j, node_steps_j = zip(*starts_of(read_journal(tmp_path)).steps_j, strict=True)
    assert steps_j == pytest.approx((5, math.inf, math.nan), nan_ok=True)
    assert node_steps_j == pytest.approx((math.nan, 7, math.nan), nan_ok=True)


def test_damaged_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_text(json.dumps({"no": "step"}) + "\n")
    with pytest.raises(InputError, match=r"energy\.jsonl, line 1"):
        EnergyJournal(tmp_path)
