"""Which steps of a run count: whole steps, after the machine has settled, for long enough.

settled   the last two blocks of steps differ by less than `tolerance` in mean power and in step time, and at
          least `settle_s` seconds and `settle_steps` steps are over. A machine that does not settle within
          `settle_limit_s` is measured all the same, and the record says `settled: false`.
window    ends at the first step after `window_s` seconds, or after `window_steps` steps that took at least
          `least_s`. NVML's counter moves every 0.1 s, so its two readings are wrong by up to 0.2 s / window:
          0.07 % of 300 s, 0.33 % of 60 s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Two readings of a counter that moves every 0.1 s (Zeus and PETSc measured 20 to 100 ms).
COUNTER_ERROR_S = 0.2

StepRecord = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """When a machine is settled and a window is long enough; see the head of this file."""

    name: str
    settle_s: float
    settle_steps: int
    settle_limit_s: float
    block_s: float
    tolerance: float
    window_s: float
    window_steps: int
    least_s: float


FULL = Rule("full", 60.0, 10, 600.0, 30.0, 0.01, 300.0, 50, 60.0)
# For a CPU and for trying things out: short windows, so differences of a few percent are noise.
SHORT = Rule("short", 0.0, 3, 0.0, 0.0, 1.0, 20.0, 8, 0.0)
RULES = {rule.name: rule for rule in (FULL, SHORT)}


@dataclass(frozen=True)
class Window:
    """What was measured in the steps that count.

    Attributes:
        first_step: The first that counts.
        last_step: Likewise.
        tokens: Trained on in these steps.
        seconds: That they took.
        energy_j: Gross; None if the meter failed.
        loss_start: Training loss of the step before.
        loss_end: Of the last.
        settled: The machine had settled before.
        settle_s: Seconds before the window.
    """

    first_step: int
    last_step: int
    tokens: int
    seconds: float
    energy_j: float | None
    loss_start: float
    loss_end: float
    settled: bool
    settle_s: float


class SteadyWindow:
    """A watch of the training that finds the window and says when it is complete."""

    def __init__(self, rule: Rule) -> None:
        """Begin; `window` is None until it is complete."""
        self.rule = rule
        self.window: Window | None = None
        self._records: list[StepRecord] = []
        self._begin: StepRecord | None = None
        self._settled = True

    def log(self, record: StepRecord) -> None:
        """Take one step of metrics.jsonl."""
        if self.window is not None:
            return
        self._records.append(record)
        if self._begin is None:
            self._look_for_begin(record)
        else:
            self._look_for_end(self._begin, record)

    @property
    def done(self) -> bool:
        """Whether the window is complete."""
        return self.window is not None

    def _look_for_begin(self, record: StepRecord) -> None:
        rule, seconds = self.rule, record["wall_s"] - self._records[0]["wall_s"]
        if len(self._records) < rule.settle_steps or seconds < rule.settle_s:
            return
        steady = is_steady(self._records, rule)
        if steady or seconds >= rule.settle_limit_s:
            self._begin, self._settled = record, steady

    def _look_for_end(self, begin: StepRecord, record: StepRecord) -> None:
        rule = self.rule
        seconds, steps = record["wall_s"] - begin["wall_s"], record["step"] - begin["step"]
        if seconds < rule.window_s and (steps < rule.window_steps or seconds < rule.least_s):
            return
        metered = record["energy_j"] is not None and begin["energy_j"] is not None
        self.window = Window(
            first_step=begin["step"] + 1,
            last_step=record["step"],
            tokens=record["tokens"] - begin["tokens"],
            seconds=seconds,
            energy_j=record["energy_j"] - begin["energy_j"] if metered else None,
            loss_start=begin["loss"],
            loss_end=record["loss"],
            settled=self._settled,
            settle_s=begin["wall_s"] - self._records[0]["wall_s"],
        )


def is_steady(records: list[StepRecord], rule: Rule) -> bool:
    """Whether the last two blocks of at least `block_s` seconds agree in power and in step time."""
    middle = _block_start(records, len(records) - 1, rule.block_s)
    if middle is None:
        return False
    first = _block_start(records, middle, rule.block_s)
    if first is None:
        return False
    before, after = _means(records[first], records[middle]), _means(records[middle], records[-1])
    return all(abs(new / old - 1) <= rule.tolerance for old, new in zip(before, after, strict=True))


def _block_start(records: list[StepRecord], end: int, block_s: float) -> int | None:
    """Index of the newest record that is `block_s` seconds and a step before record `end`."""
    for start in range(end - 1, -1, -1):
        if records[end]["wall_s"] - records[start]["wall_s"] >= block_s:
            return start
    return None


def _means(begin: StepRecord, end: StepRecord) -> tuple[float, float]:
    """Mean watts and seconds a step; a failed meter makes the watts NaN, which agree with nothing."""
    seconds = end["wall_s"] - begin["wall_s"]
    metered = begin["energy_j"] is not None and end["energy_j"] is not None
    watts = (end["energy_j"] - begin["energy_j"]) / seconds if metered else math.nan
    return watts, seconds / (end["step"] - begin["step"])


def resolution(source: str, window_s: float) -> float:
    """Relative difference that the meter cannot tell from none, at windows of this length."""
    return COUNTER_ERROR_S / window_s if source.startswith("nvml") else 0.0
