"""Foreign tensors become one of our checkpoints: streamed, hashed, checked, and only then given its name."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import JsonValue
from torch import Tensor

from moe.checkpoint.manifest import commit_manifest, hash_files
from moe.config.schema import ModelSection
from moe.convert.families import Family
from moe.convert.hf_writer import TORCH_DTYPES
from moe.convert.logits import LogitCheck
from moe.convert.mapping import Part
from moe.convert.shards import write_shards
from moe.convert.text_files import copy_text_files
from moe.durable import fsync_directory, require_free_space, storage_error, write_atomically
from moe.errors import InputError

MODEL_FILE = "model.yaml"
PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True)
class Incoming:
    """A model in the tensors of a family.

    Attributes:
        family: whose names the tensors have.
        config: content of config.json.
        model: what the checkpoint will hold.
        parts: every part of it.
        dtypes: of each tensor of the family, as safetensors names it.
        copies: tensors that repeat others, and that an export is to repeat.
        text_files: of the tokenizer and of generation, kept as they are.
        read: gives a tensor of the family.
    """

    family: Family
    config: Mapping[str, Any]
    model: ModelSection
    parts: Sequence[Part]
    dtypes: Mapping[str, str]
    copies: Sequence[str]
    text_files: Sequence[Path]
    read: Callable[[str], Tensor]


def write_checkpoint(
    checkpoint: Path, incoming: Incoming, check: Callable[[Path], LogitCheck | None]
) -> LogitCheck | None:
    """Write a checkpoint that `train.init_from` starts from, and `model.yaml` beside its shards.

    Args:
        checkpoint: the folder; it must not exist.
        incoming: what is written, part by part.
        check: is given the finished folder under another name; what it raises leaves nothing behind.

    Returns:
        What `check` found.

    Raises:
        InputError: it cannot be written.
    """
    partial = checkpoint.with_name(checkpoint.name + PARTIAL_SUFFIX)
    try:
        _write(partial, incoming)
        found = check(partial)
        partial.rename(checkpoint)
        fsync_directory(checkpoint.parent)
    except OSError as error:
        raise storage_error(checkpoint, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return found


def refuse_existing(path: Path) -> None:
    """Raise InputError if something has that name already."""
    if path.exists():
        raise InputError(f"{path} exists already; remove it or choose another name")


def dtypes_of(parts: Sequence[Part], foreign: Mapping[str, str]) -> dict[str, torch.dtype]:
    """For each of our tensors the widest dtype among the tensors that it is made of; fp32 if of none."""
    dtypes: dict[str, torch.dtype] = {}
    for part in parts:
        for found in [TORCH_DTYPES[foreign[name]] for name, _ in part.theirs]:
            dtypes[part.key] = torch.promote_types(dtypes.get(part.key, found), found)
        dtypes.setdefault(part.key, torch.float32)
    return dtypes


def _write(partial: Path, incoming: Incoming) -> None:
    parts, dtypes = incoming.parts, dtypes_of(incoming.parts, incoming.dtypes)

    def read(part: Part) -> Tensor:
        return part.join([incoming.read(name) for name, _ in part.theirs]).to(dtypes[part.key])

    shutil.rmtree(partial, ignore_errors=True)  # what a killed conversion left
    partial.mkdir(parents=True)
    needed_bytes = sum(math.prod(part.shape) * dtypes[part.key].itemsize for part in parts)
    require_free_space(partial, needed_bytes)
    write_shards(partial, parts, dtypes, read)
    recipe = {"model": incoming.model.model_dump(mode="json", exclude_defaults=True)}
    write_atomically(partial / MODEL_FILE, yaml.safe_dump(recipe, sort_keys=False))
    copy_text_files(incoming.text_files, partial)
    names = sorted(path.name for path in partial.iterdir())
    commit_manifest(partial, step=0, entries=hash_files(partial, names), state=_state(incoming, dtypes))


def _state(incoming: Incoming, dtypes: Mapping[str, torch.dtype]) -> dict[str, JsonValue]:
    """What an export needs beside tensors: the model, where it came from, and dtypes that fusing widened."""
    widened: dict[str, JsonValue] = {
        name: incoming.dtypes[name]
        for part in incoming.parts
        for name, _ in part.theirs
        if TORCH_DTYPES[incoming.dtypes[name]] != dtypes[part.key]
    }
    origin: dict[str, JsonValue] = {
        "family": incoming.family.name,
        "config": dict(incoming.config),
        "dtypes": widened,
        "copies": list(incoming.copies),
    }
    return {"model": incoming.model.model_dump(mode="json"), "huggingface": origin}
