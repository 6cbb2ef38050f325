"""Reading a checkpoint: verify every bit first, change weights only then."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from moe.checkpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    compare_names,
    damaged,
    read_manifest,
    split_by_bytes,
    unreadable,
    wrong_hashes,
)
from moe.checkpoint.pickle_gate import DCP_METADATA_GLOBALS, check_pickle, weights_only_forced
from moe.checkpoint.save import rng_name
from moe.checkpoint.store import list_complete, newest_valid, quarantine
from moe.errors import CorruptCheckpointError, InputError, MoeError
from moe.ranks import on_every_rank, on_rank0, ranks_on_this_machine


class WeightSink(Protocol):
    """The part of an engine that a new run's first weights need."""

    def load_weights(self, directory: Path) -> None:
        """Read weights, in whatever layout and precision they were written; collective."""
        ...


class ShardSink(Protocol):
    """The part of an engine that loading needs."""

    rank: int

    def load_shards(self, directory: Path, step: int) -> None:
        """Read weights and moments, in whatever layout they were written; collective."""
        ...

    def set_rng_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore random generator states, written on the same kind of device."""
        ...


def find_checkpoint(root: Path, on_note: Callable[[str], None]) -> Path:
    """The newest checkpoint that is intact bit for bit; collective, rank 0 renames damaged ones.

    Args:
        root: the folder of all checkpoints of the run.
        on_note: told of each damaged checkpoint, on rank 0.

    Raises:
        InputError: there is none, or a rank cannot read what rank 0 found; then nothing is renamed.
        CorruptCheckpointError: none is intact.
    """

    def set_aside(checkpoint: Path, error: CorruptCheckpointError) -> None:
        # Left in place, it would count among those to keep, and the next save would delete the intact one.
        aside = quarantine(checkpoint)
        on_note(f"{error} It was moved to {aside}; falling back to the checkpoint before it.")

    try:
        return newest_valid(
            root,
            on_corrupt=lambda checkpoint, error: on_rank0(lambda: set_aside(checkpoint, error)),
            candidates=lambda root: on_rank0(lambda: list_complete(root)),
            check=verify_together,
        )
    except MoeError as error:
        error.on_all_ranks = True  # all walk the same list with the same findings
        raise


def verify_together(checkpoint: Path) -> Manifest:
    """Check every bit of a checkpoint, each rank a share of the bytes; collective.

    Rank 0 alone compares names and sizes: thousands of ranks must not scan a shared file system. Then all
    hash, so that a collective waits for the slowest rank only, however large the checkpoint. What a rank
    finds damaged is read again on another machine, where there are several, before it counts: a good
    checkpoint must not be given up for one machine's memory or mount.

    Args:
        checkpoint: the folder, the same on every rank.

    Returns:
        The manifest.

    Raises:
        CorruptCheckpointError: names every damaged file.
        InputError: a rank cannot read a file, or reads other bytes than another rank; names the host.
    """
    manifest, problems = on_rank0(lambda: compare_names(checkpoint))
    sound = manifest.without(problems)
    shares = split_by_bytes(sound, dist.get_world_size())
    found = on_every_rank(lambda: _read_share(checkpoint, shares[dist.get_rank()]))
    if any(wrong for _, wrong in found):
        problems |= _confirmed(checkpoint, sound, found)
    if problems:
        raise damaged(checkpoint, problems)
    return manifest


Findings = tuple[str, dict[str, str]]  # of a rank: its host, and by name what is wrong with a file


def _read_share(checkpoint: Path, entries: Sequence[FileEntry]) -> Findings:
    try:
        (checkpoint / MANIFEST_NAME).stat()  # a rank without a share must see the folder, too
    except OSError as error:
        raise unreadable(checkpoint, error) from error
    workers = max(1, (os.cpu_count() or 1) // ranks_on_this_machine())
    return socket.gethostname(), wrong_hashes(checkpoint, entries, workers=workers)


def _confirmed(checkpoint: Path, sound: Sequence[FileEntry], found: Sequence[Findings]) -> dict[str, str]:
    """What ranks found wrong, each one's findings read again by the rank half the job away; collective."""
    ranks = len(found)
    half = ranks // 2  # at least the ranks of a machine, where there are several machines
    _, doubted = found[(dist.get_rank() + half) % ranks]
    again = on_every_rank(
        lambda: _read_share(checkpoint, [entry for entry in sound if entry.name in doubted])
    )
    confirmed: dict[str, str] = {}
    for rank, (host, wrong) in enumerate(found):
        second = (rank - half) % ranks
        other_host, still_wrong = again[second]
        if cleared := sorted(wrong.keys() - still_wrong.keys()):
            raise InputError(
                f"rank {rank} on host {host} read other bytes of {checkpoint} than were saved, "
                f"rank {second} on host {other_host} then read the right ones, in {', '.join(cleared)}. "
                f"Check the memory, network and mounts of {host}. Nothing was renamed."
            )
        confirmed |= still_wrong
    return confirmed


def written_on(checkpoint: Path) -> str:
    """The kind of device, `cpu` or `cuda`, of the job that wrote a checkpoint.

    Only on CUDA has an engine generators of its own beside the CPU's.
    """
    with safe_open(checkpoint / rng_name(0), framework="pt") as states:
        return "cuda" if "cuda" in states.keys() else "cpu"  # noqa: SIM118 - it is no mapping


def load_checkpoint(engine: ShardSink, checkpoint: Path, *, with_rng: bool) -> Manifest:
    """Load a checkpoint that find_checkpoint verified; collective.

    Args:
        engine: takes the weights, the moments and, where told to, the random generator states.
        checkpoint: the folder.
        with_rng: whether the job has the ranks that wrote it, each in its old place, on the same kind of
            device.

    Returns:
        The manifest, whose state continues the run.

    Raises:
        CorruptCheckpointError: the manifest is damaged or a pickle in the folder names foreign code.
    """
    manifest = read_manifest(checkpoint)
    with _pickles_closed(checkpoint):
        engine.load_shards(checkpoint, manifest.step)
    if with_rng:
        engine.set_rng_state(load_file(checkpoint / rng_name(engine.rank)))
    return manifest


def load_initial_weights(engine: WeightSink, checkpoint: Path) -> None:
    """Fill a new run's model from a checkpoint that was verified; collective.

    Raises:
        CorruptCheckpointError: a pickle in the folder names foreign code.
    """
    with _pickles_closed(checkpoint):
        engine.load_weights(checkpoint)


@contextmanager
def _pickles_closed(checkpoint: Path) -> Iterator[None]:
    metadata = checkpoint / ".metadata"
    if metadata.exists():
        check_pickle(metadata, DCP_METADATA_GLOBALS)
    with weights_only_forced():
        yield
