"""The folder of a run: where a new one goes, and what may change when one goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.checkpoint.store import list_complete
from moe.config import RunConfig, load_config
from moe.errors import InputError
from moe.metering.journal import JOURNAL_FILE
from moe.metering.jsonl import METRICS_FILE, read_step_log

CONFIG_FILE = "config.yaml"
STARTS_FILE = "starts.jsonl"
REPORT_FILE = "report.json"

# A run that changed one of these on the way would be another run under the same name.
FIXED = (
    "model",
    "data.seq_length",
    "run.name",
    "run.seed",
    "optim.name",
    "train.global_batch_size",
    "train.batch_schedule",
    "train.precision",
)


def choose_run_dir(config: RunConfig, wanted: Path | None, *, under_torchrun: bool) -> Path:
    """Where a new run goes: the folder asked for, else the first free of name, name-2, name-3, ...

    Under torchrun every rank chooses by itself, so the plain name is taken; `refuse_existing` comes later.
    """
    default = config.run.root / config.run.name
    if wanted is None and not under_torchrun:
        return next(path for path in _numbered(default) if _taken(path) is None)
    return wanted or default


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}-{number}")
        number += 1


def refuse_existing(run_dir: Path) -> None:
    """Raise InputError if the folder holds a run that did a step; anything less may be replaced."""
    problem = _taken(run_dir)
    if problem is not None:
        raise InputError(problem)


def _taken(run_dir: Path) -> str | None:
    if list_complete(run_dir / "checkpoints"):
        return (
            f"{run_dir} already holds a run; continue it with `moe resume {run_dir}` "
            "or choose another --run-dir"
        )
    if (run_dir / METRICS_FILE).exists():
        return (
            f"{run_dir} holds a run that ended before its first checkpoint; remove the folder "
            "or choose another --run-dir"
        )
    return None


def check_unchanged(run_dir: Path, config: RunConfig) -> None:
    """Raise InputError if a resume would change what makes the run what it is."""
    before, after = load_config(run_dir / CONFIG_FILE, world_size=None).model_dump(), config.model_dump()
    changed = [key for key in FIXED if _at(before, key) != _at(after, key)]
    if changed:
        raise InputError(
            f"a resumed run cannot change {', '.join(changed)}; start a new one with `moe train`, "
            "or leave the value as it was"
        )


def can_resume(run_dir: Path, config: RunConfig) -> bool:
    """Whether the folder holds a checkpoint to go on from.

    Raises:
        InputError: what it holds belongs to another run.
    """
    if (run_dir / CONFIG_FILE).exists():
        check_unchanged(run_dir, config)
    return bool(list_complete(run_dir / "checkpoints"))


def check_tokenizer(run_dir: Path, fingerprint: str) -> None:
    """Raise InputError if the newest start had another tokenizer: the same ids would be other text."""
    path = run_dir / STARTS_FILE
    starts = read_step_log(path) if path.exists() else []
    before = starts[-1].get("tokenizer") if starts else None  # a start of an earlier version names none
    if before not in (None, fingerprint):
        raise InputError(
            f"{run_dir} was trained with the tokenizer {before[:12]}, this one is {fingerprint[:12]}: its "
            "ids mean other text; name the run's own in data.tokenizer or, with the default data, which is "
            "made of Python's library, resume with the Python that began the run"
        )


def _at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def ranks_of_newest(run_dir: Path) -> int:
    """Number of ranks of the run's newest start, to which its config.yaml belongs.

    Raises:
        InputError: there is no run or no checkpoint.
    """
    if not (run_dir / CONFIG_FILE).exists():
        raise InputError(f"{run_dir} holds no run: {CONFIG_FILE} is missing; start one with `moe train`")
    starts = read_step_log(run_dir / STARTS_FILE) if (run_dir / STARTS_FILE).exists() else []
    if starts and list_complete(run_dir / "checkpoints"):
        return int(starts[-1]["world_size"])
    raise InputError(
        f"{run_dir} has no complete checkpoint to resume from; start again with `moe train` "
        "and another --run-dir"
    )


def log_start(
    run_dir: Path, *, step: int, energy_j: float, wall_s: float, world_size: int, tokenizer: str
) -> None:
    """Add a line to starts.jsonl: where a start begins, on how many ranks, and what was spent before.

    `tokenizer` is a fingerprint.
    """
    line = {
        "step": step,
        "energy_j": energy_j if math.isfinite(energy_j) else None,
        "wall_s": wall_s,
        "world_size": world_size,
        "tokenizer": tokenizer,
    }
    with (run_dir / STARTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Spent:
    """What all earlier starts of a run took, steps that will be done again included.

    Attributes:
        energy_j: Joules, by the meter; NaN if it failed in one of them.
        node_j: Joules of whole machines; NaN if one of them did not measure those.
        wall_s: Seconds in the training loop.
    """

    energy_j: float
    node_j: float
    wall_s: float


def spent_before(run_dir: Path) -> Spent:
    """What the run took so far, from the file that knows the most.

    The metrics have every step but lose the lines of those that are done again; starts.jsonl and energy.jsonl
    keep what they cost, and energy.jsonl alone what the last checkpoint did.
    """
    records = [
        record
        for name in (METRICS_FILE, STARTS_FILE, JOURNAL_FILE)
        if (run_dir / name).exists()
        for record in read_step_log(run_dir / name)
    ]
    failed = any(record.get("energy_j", 0.0) is None for record in records)
    metered = [record for record in records if "world_size" not in record]  # starts.jsonl has no node_j
    nodes_j = [math.nan if record.get("node_j") is None else record["node_j"] for record in metered]
    nodes_known = bool(nodes_j) and not any(math.isnan(node_j) for node_j in nodes_j)
    return Spent(
        energy_j=math.nan
        if failed
        else max((record.get("energy_j", 0.0) for record in records), default=0.0),
        node_j=max(nodes_j) if nodes_known else math.nan if records else 0.0,
        wall_s=max((record.get("wall_s") or 0.0 for record in records), default=0.0),
    )
