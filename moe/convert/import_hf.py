"""A Hugging Face folder becomes one of our checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from pydantic import JsonValue
from torch import Tensor

from moe.checkpoint.manifest import commit_manifest, hash_files
from moe.config.schema import ModelSection
from moe.convert.families import Family, family_of_config
from moe.convert.hf_reader import HfFolder, check_tensors
from moe.convert.hf_writer import TORCH_DTYPES
from moe.convert.logits import LogitCheck, compare_logits
from moe.convert.mapping import Part, bind
from moe.convert.model_of import run_config
from moe.convert.shards import write_shards
from moe.durable import fsync_directory, require_free_space, storage_error, write_atomically
from moe.engine.one_rank import tensor_shapes
from moe.errors import InputError

MODEL_FILE = "model.yaml"
PARTIAL_SUFFIX = ".partial"


def import_hf(
    hf_dir: Path, checkpoint: Path, *, check_logits: bool, note: Callable[[str], None]
) -> LogitCheck | None:
    """Write a checkpoint that `train.init_from` starts from.

    No tensor is changed: each keeps its dtype. Memory holds no more than the largest tensor twice, but for
    the logit check, which holds both models.

    Args:
        hf_dir: as `save_pretrained` writes it; only the files that hold weights are read.
        checkpoint: the folder to write; it must not exist. Beside the shards it gets `model.yaml`, the
            section `model` of a recipe.
        check_logits: compare our logits with those of transformers at the end.
        note: told what was found.

    Returns:
        What the logit check found; None where it was not asked for.

    Raises:
        InputError: the folder cannot be converted, or the logits differ; nothing was written.
    """
    refuse_existing(checkpoint)
    folder = HfFolder(hf_dir)
    family = family_of_config(folder.config)
    model = _without_absent_predictions(folder, family.model_of(folder.config), note)
    parts = bind(family.table(model), tensor_shapes(run_config(model, precision="fp32")), family.name)
    check_tensors(folder, parts, family.copies(model))
    note(f"{hf_dir}: {family.name}, {len(folder.tensors):,} tensors, all as config.json says")
    partial = checkpoint.with_name(checkpoint.name + PARTIAL_SUFFIX)
    try:
        _write(folder, model, parts, partial, _state(folder, family, model, parts))
        found = compare_logits(hf_dir, partial, model) if check_logits else None
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


def _without_absent_predictions(
    folder: HfFolder, model: ModelSection, note: Callable[[str], None]
) -> ModelSection:
    """Transformers keeps the number of prediction layers in the config, but saves none of their tensors."""
    first = f"model.layers.{model.num_layers}."
    if model.mtp_layers == 0 or any(name.startswith(first) for name in folder.tensors):
        return model
    note(f"config.json counts {model.mtp_layers} layer(s) of multi-token prediction; the folder has none")
    return model.model_copy(update={"mtp_layers": 0})


def dtypes_of(folder: HfFolder, parts: Sequence[Part]) -> dict[str, torch.dtype]:
    """For each of our tensors the widest dtype among the tensors that it is made of; fp32 if of none."""
    dtypes: dict[str, torch.dtype] = {}
    for part in parts:
        for found in [TORCH_DTYPES[folder.tensors[name].dtype] for name, _ in part.theirs]:
            dtypes[part.key] = torch.promote_types(dtypes.get(part.key, found), found)
        dtypes.setdefault(part.key, torch.float32)
    return dtypes


def _write(
    folder: HfFolder, model: ModelSection, parts: Sequence[Part], partial: Path, state: dict[str, JsonValue]
) -> None:
    dtypes = dtypes_of(folder, parts)

    def read(part: Part) -> Tensor:
        return part.join([folder.read(name) for name, _ in part.theirs]).to(dtypes[part.key])

    shutil.rmtree(partial, ignore_errors=True)  # what a killed import left
    partial.mkdir(parents=True)
    needed_bytes = sum(math.prod(part.shape) * dtypes[part.key].itemsize for part in parts)
    require_free_space(partial, needed_bytes)
    write_shards(partial, parts, dtypes, read)
    recipe = {"model": model.model_dump(mode="json", exclude_defaults=True)}
    write_atomically(partial / MODEL_FILE, yaml.safe_dump(recipe, sort_keys=False))
    names = sorted(path.name for path in partial.iterdir())
    commit_manifest(partial, step=0, entries=hash_files(partial, names), state=state)


def _state(
    folder: HfFolder, family: Family, model: ModelSection, parts: Sequence[Part]
) -> dict[str, JsonValue]:
    """What an export needs beside tensors: the model, where it came from, and dtypes that fusing widened."""
    dtypes = dtypes_of(folder, parts)
    widened: dict[str, JsonValue] = {
        name: folder.tensors[name].dtype
        for part in parts
        for name, _ in part.theirs
        if TORCH_DTYPES[folder.tensors[name].dtype] != dtypes[part.key]
    }
    origin: dict[str, JsonValue] = {
        "family": family.name,
        "config": dict(folder.config),
        "dtypes": widened,
        "copies": [name for name in family.copies(model) if name in folder.tensors],
    }
    return {"model": model.model_dump(mode="json"), "huggingface": origin}
