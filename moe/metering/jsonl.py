"""Logs with one JSON object a line and a step: `metrics.jsonl` and `expert_load.jsonl` of a run folder.

`metrics.jsonl`, one line for each optimizer step:
    step                       counted from 1
    loss                       training loss, nats per token
    grad_norm                  before clipping
    tokens                     trained on so far, over all starts of the run
    tokens_per_s               over the last steps
    lr                         learning rate
    expert_load_max_over_mean  busiest expert over mean expert, worst layer
    energy_j                   joules so far, over all machines and all starts of the run
    useful_j                   those of the steps up to this one, each counted once
    tokens_per_j               tokens / energy_j; null where energy_validity is invalid
    energy_source, energy_boundary, energy_validity    what these joules are; see moe.metering.energy
    node_j                     joules of whole machines, where energy.node_command measures them
    counter_step_j, node_counter_step_j    see moe.metering.journal; where an operator's counter is read
    power_w                    mean since the line before, over all machines
    wall_s                     seconds in the training loop so far, over all starts
    heldout_loss, heldout_bits_per_byte    on evaluation steps only
    max_attention_logit        of all heads, before clipping; where optim.qk_clip acts
    anything else              shown nowhere, kept for the reader (auxiliary losses, ...)

`expert_load.jsonl`, one line whenever the loop chooses:
    step
    counts                     tokens of each expert since the line before, [num_moe_layers][num_experts]

A value that was not measured or is not finite is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe.durable import atomic_writer, storage_error
from moe.errors import InputError

METRICS_FILE = "metrics.jsonl"
EXPERT_LOAD_FILE = "expert_load.jsonl"


class StepLog:
    """Appends one JSON object a line, so that a run that dies loses nothing before its last step."""

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        """Open the log.

        Args:
            path: The file; made if missing.
            resume_step: The step that the run continues from. Lines of later steps, which will be done again,
                are dropped, and so is a last line cut short by a crash; 0 starts the log afresh.

        Raises:
            InputError: A line that should be kept is not JSON with a step.
        """
        # The newest line kept, from which running totals go on; None in a fresh log.
        self.last: dict[str, Any] | None = None
        try:
            with atomic_writer(path) as kept:
                for record in _records(path) if path.exists() else ():
                    if record["step"] <= resume_step:
                        self.last = record
                        kept.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise storage_error(path, error) from error
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, which has a `step`, and hand it to the operating system."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_step_log(path: Path) -> list[dict[str, Any]]:
    """Read every record of a log, leaving out a last line that a crash cut short.

    Raises:
        InputError: The file is missing, or a line is not a JSON object with an integer `step`.
    """
    try:
        return list(_records(path))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; is {path.parent} the folder of a run?") from error


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """One after the other, for expert loads of a long run with many experts are gigabytes."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith("\n"):  # as every complete line does
                yield _parse(path, number, line)


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number} is not JSON: {error}; remove the line to go on") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise InputError(f"{path}, line {number} has no integer `step`; remove the line to go on")
    return record
