"""Reading and comparing whole checkpoints, whatever layout wrote them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole: weights, biases, main parameters and moments."""
    reader = FileSystemReader(checkpoint)
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def differing_tensors(found: Path, expected: Path) -> tuple[int, list[str]]:
    """How many tensors both hold, and the names of those that differ in any byte."""
    a, b = tensors(found), tensors(expected)
    assert a.keys() == b.keys()
    return len(a), [key for key in a if not torch.equal(a[key].view(torch.uint8), b[key].view(torch.uint8))]


def assert_bit_equal(found: Path, expected: Path) -> None:
    """Fail with the names of the tensors that differ in any byte."""
    _, differing = differing_tensors(found, expected)
    assert differing == []
