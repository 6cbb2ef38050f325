"""Writing a checkpoint: every rank its shards and their hashes, then rank 0 the manifest, last.

Files of `step_NNNNNNNN/`: the engine's shards, `rng_NNNNN.safetensors` of each rank, `manifest.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from pydantic import JsonValue
from safetensors.torch import save_file
from torch import Tensor

from moe.checkpoint.manifest import FileEntry, commit_manifest, hash_files
from moe.checkpoint.store import apply_retention, begin, finish
from moe.durable import require_free_space
from moe.ranks import on_every_rank, on_rank0


class ShardSource(Protocol):
    """The part of an engine that saving needs."""

    rank: int
    checkpoint_bytes: int  # of all ranks together

    def save_shards(self, directory: Path) -> None:
        """Write this rank's share; collective."""
        ...

    def shard_files(self, directory: Path) -> list[str]:
        """Names of the files that this rank wrote."""
        ...

    def rng_state(self) -> dict[str, Tensor]:
        """Random generator states of this rank."""
        ...


def save_checkpoint(
    engine: ShardSource, root: Path, step: int, state: Mapping[str, JsonValue], *, keep: int
) -> Path:
    """Write `root/step_NNNNNNNN`; collective, on storage that all ranks see.

    A crash at any instant leaves the checkpoints before it as they were.

    Args:
        engine: whose weights and moments are saved.
        root: the folder of all checkpoints of the run.
        step: optimizer steps done.
        state: what a resume needs beside tensors; goes into the manifest.
        keep: complete checkpoints that stay.

    Returns:
        The folder.

    Raises:
        InputError: a file cannot be written; the text says "no space" where that is the cause.
        CorruptCheckpointError: the folder does not hold what was written.
    """

    def open_folder() -> Path:
        require_free_space(root, engine.checkpoint_bytes)
        return begin(root, step)

    partial = on_rank0(open_folder)
    engine.save_shards(partial)

    def seal_own_files() -> list[FileEntry]:
        rng_file = rng_name(engine.rank)
        save_file(engine.rng_state(), partial / rng_file)
        return hash_files(partial, [*engine.shard_files(partial), rng_file])

    entries = [entry for part in on_every_rank(seal_own_files) for entry in part]

    def commit() -> Path:
        commit_manifest(partial, step=step, entries=entries, state=state)
        final = finish(partial)
        apply_retention(root, keep)
        return final

    return on_rank0(commit)


def rng_name(rank: int) -> str:
    """File of one rank's random generator states."""
    return f"rng_{rank:05d}.safetensors"
