"""Whether two folders, of Hugging Face or of ours, hold the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe.checkpoint.manifest import MANIFEST_NAME
from moe.config.schema import ModelSection
from moe.convert.export_hf import open_checkpoint
from moe.convert.families import family_of_config
from moe.convert.hf_reader import HfFolder
from moe.convert.logits import LogitCheck, compare_logits
from moe.errors import InputError

_MOST_LISTED = 20


@dataclass(frozen=True)
class Comparison:
    """What two folders have in common."""

    tensors: int
    logits: LogitCheck | None  # None: not asked for, or both are Hugging Face folders


@dataclass(frozen=True)
class _Side:
    """One folder, seen as the tensors of a family."""

    names: frozenset[str]
    read: Callable[[str], Tensor]
    model: ModelSection | None  # of a checkpoint


def check(one: Path, other: Path, *, check_logits: bool) -> Comparison:
    """Compare every tensor bit for bit, then the logits of a Hugging Face folder and a checkpoint.

    Args:
        one: a Hugging Face folder or a checkpoint.
        other: likewise; at most one tensor of each is in memory at a time.
        check_logits: run sample tokens through both; not of two folders of the same kind.

    Raises:
        InputError: they differ; the text names the tensors.
    """
    folders = {path: HfFolder(path) for path in (one, other) if not (path / MANIFEST_NAME).exists()}
    named = [family_of_config(folder.config).name for folder in folders.values()]
    left, right = (_side(path, folders.get(path), named[0] if named else None) for path in (one, other))
    problems = [f"{name}: only in {one}" for name in sorted(left.names - right.names)]
    problems += [f"{name}: only in {other}" for name in sorted(right.names - left.names)]
    for name in sorted(left.names & right.names):
        difference = _difference(left.read(name), right.read(name))
        if difference:
            problems.append(f"{name}: {difference}")
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:_MOST_LISTED])
        raise InputError(f"{one} and {other} differ in {len(problems)} tensor(s):\n{listed}")
    found = None
    if check_logits and left.model is None and right.model is not None:
        found = compare_logits(one, other, right.model)
    elif check_logits and left.model is not None and right.model is None:
        found = compare_logits(other, one, left.model)
    return Comparison(len(left.names), found)


def _side(path: Path, folder: HfFolder | None, family: str | None) -> _Side:
    """A checkpoint is seen as the family of the folder that it is compared with."""
    if folder is not None:
        return _Side(frozenset(folder.tensors), folder.read, None)
    source = open_checkpoint(path, family)
    return _Side(frozenset(source.layout), source.read, source.model)


def _difference(one: Tensor, other: Tensor) -> str | None:
    """In words; None if both are equal bit for bit."""
    if one.shape != other.shape:
        return f"shapes {list(one.shape)} and {list(other.shape)}"
    if one.dtype != other.dtype:
        return f"dtypes {one.dtype} and {other.dtype}"
    one_bytes, other_bytes = (t.contiguous().view(-1).view(torch.uint8) for t in (one, other))
    differing = int((one_bytes != other_bytes).sum())
    return f"{differing:,} of {one.nbytes:,} bytes differ" if differing else None
