"""Reading a checkpoint: verify every bit first, change weights only then."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file
from torch import Tensor

from moe.checkpoint.manifest import Manifest, read_manifest
from moe.checkpoint.pickle_gate import DCP_METADATA_GLOBALS, check_pickle, weights_only_forced
from moe.checkpoint.save import rng_name
from moe.checkpoint.store import newest_valid, quarantine
from moe.errors import CorruptCheckpointError
from moe.ranks import on_rank0


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
        """Restore random generator states."""
        ...


def find_checkpoint(root: Path, on_note: Callable[[str], None]) -> Path:
    """The newest checkpoint that is intact bit for bit; collective, rank 0 hashes and renames damaged ones.

    Args:
        root: the folder of all checkpoints of the run.
        on_note: told of each damaged checkpoint, on rank 0.

    Raises:
        InputError: there is none.
        CorruptCheckpointError: none is intact.
    """

    def set_aside(checkpoint: Path, error: CorruptCheckpointError) -> None:
        # Left in place, it would count among those to keep, and the next save would delete the intact one.
        aside = quarantine(checkpoint)
        on_note(f"{error} It was moved to {aside}; falling back to the checkpoint before it.")

    return on_rank0(lambda: newest_valid(root, on_corrupt=set_aside, workers=os.cpu_count() or 1))


def load_checkpoint(engine: ShardSink, checkpoint: Path, *, same_layout: bool) -> Manifest:
    """Load a checkpoint that find_checkpoint verified; collective.

    Args:
        engine: takes the weights, the moments and, in the same layout, the random generator states.
        checkpoint: the folder.
        same_layout: whether the job has the ranks that wrote it, each in its old place.

    Returns:
        The manifest, whose state continues the run.

    Raises:
        CorruptCheckpointError: the manifest is damaged or a pickle in the folder names foreign code.
    """
    manifest = read_manifest(checkpoint)
    with _pickles_closed(checkpoint):
        engine.load_shards(checkpoint, manifest.step)
    if same_layout:
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
