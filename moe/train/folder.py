"""The folder of a run: where a new one goes, and what may change when one goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe.checkpoint.manifest import read_manifest
from moe.checkpoint.store import list_complete
from moe.config import RunConfig, load_config
from moe.errors import CorruptCheckpointError, InputError

CONFIG_FILE = "config.yaml"

# A run that changed one of these on the way would be another run under the same name.
FIXED = ("model", "data", "run.name", "run.seed", "train.global_batch_size", "train.precision")


def choose_run_dir(config: RunConfig, wanted: Path | None, *, under_torchrun: bool) -> Path:
    """Where a new run goes: the folder asked for, else the first free of name, name-2, name-3, ...

    Under torchrun every rank chooses by itself, so the plain name is taken; `refuse_existing` is asked later.
    """
    default = config.run.root / config.run.name
    if wanted is None and not under_torchrun:
        return next(path for path in _numbered(default) if not path.exists())
    return wanted or default


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}-{number}")
        number += 1


def refuse_existing(run_dir: Path) -> None:
    """Raise InputError if the folder already holds a run."""
    if (run_dir / CONFIG_FILE).exists():
        raise InputError(
            f"{run_dir} already holds a run; continue it with `moe resume {run_dir}` "
            "or choose another --run-dir"
        )


def check_unchanged(run_dir: Path, config: RunConfig) -> None:
    """Raise InputError if a resume would change what makes the run what it is."""
    before, after = load_config(run_dir / CONFIG_FILE, world_size=None).model_dump(), config.model_dump()
    changed = [key for key in FIXED if _at(before, key) != _at(after, key)]
    if changed:
        raise InputError(
            f"a resumed run cannot change {', '.join(changed)}; start a new one with `moe train`, "
            "or leave the value as it was"
        )


def _at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def ranks_of_newest(run_dir: Path) -> int:
    """Number of ranks that wrote the newest readable checkpoint.

    Raises:
        InputError: there is no run or no checkpoint.
    """
    if not (run_dir / CONFIG_FILE).exists():
        raise InputError(f"{run_dir} holds no run: {CONFIG_FILE} is missing; start one with `moe train`")
    for checkpoint in list_complete(run_dir / "checkpoints"):
        try:
            return int(str(read_manifest(checkpoint).state["world_size"]))
        except CorruptCheckpointError:
            continue  # loading will name it and fall back, too
    raise InputError(f"{run_dir} has no complete checkpoint to resume from; start again with `moe train`")
