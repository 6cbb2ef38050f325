"""One of our checkpoints becomes a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from moe.checkpoint.manifest import verify
from moe.config.compare import differences
from moe.config.schema import ModelSection
from moe.convert.families import FAMILIES, Family, family_named, family_of_config
from moe.convert.hf_reader import CONFIG_FILE
from moe.convert.hf_writer import TORCH_DTYPES, write_safetensors
from moe.convert.logits import LogitCheck, compare_logits
from moe.convert.mapping import Part, Shape, bind
from moe.convert.model_of import run_config
from moe.convert.shards import METADATA_FILE, ShardReader
from moe.convert.text_files import copy_text_files, text_files_of
from moe.convert.write_checkpoint import PARTIAL_SUFFIX, refuse_existing
from moe.durable import fsync_directory, storage_error, write_atomically
from moe.engine.one_rank import tensor_shapes
from moe.errors import InputError

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Source:
    """A checkpoint as the tensors of a family.

    Attributes:
        model: what it holds.
        family: whose names the tensors have.
        config: content of config.json.
        layout: shape and dtype of every tensor, in the order in which they are read fastest.
    """

    model: ModelSection
    family: Family
    config: dict[str, Any]
    layout: dict[str, tuple[Shape, str]]
    _parts: dict[str, tuple[Part, int]]
    _copies: dict[str, str]
    _zeros: tuple[Part, ...]
    _shards: ShardReader

    def read(self, name: str) -> Tensor:
        """One tensor of the family, in its dtype."""
        part, number = self._parts[self._copies.get(name, name)]
        region = self._shards.read(part.key, part.offset, part.shape)
        return part.split(region)[number].to(TORCH_DTYPES[self.layout[name][1]])

    def check_left_out(self) -> None:
        """Raise InputError if a tensor that the family does not have is not zero."""
        for part in self._zeros:
            part.split(self._shards.read(part.key, part.offset, part.shape))


def export_hf(
    checkpoint: Path,
    hf_dir: Path,
    *,
    family: str | None,
    check_logits: bool,
    note: Callable[[str], None],
) -> LogitCheck | None:
    """Write config.json and safetensors that `from_pretrained` loads, and the tokenizer if it was imported.

    Each tensor keeps the dtype that the checkpoint holds. Memory holds no more than the largest stored shard
    twice, but for the logit check, which holds both models.

    Args:
        checkpoint: an imported one, or one of training in any layout.
        hf_dir: the folder to write; it must not exist.
        family: a model_type; None takes where the checkpoint came from, or the only family that fits.
        check_logits: compare our logits with those of transformers at the end.
        note: told what was found.

    Returns:
        What the logit check found; None where it was not asked for.

    Raises:
        InputError: the model fits no family, or the logits differ; nothing was written.
        CorruptCheckpointError: the checkpoint is damaged.
    """
    refuse_existing(hf_dir)
    source = open_checkpoint(checkpoint, family)
    source.check_left_out()
    text_files = text_files_of(checkpoint)
    note(f"{checkpoint}: {source.family.name}, {len(source.layout):,} tensors")
    if not any(path.name.startswith("tokenizer") for path in text_files):
        note("the checkpoint has no tokenizer; copy its files from the folder that the weights came from")
    partial = hf_dir.with_name(hf_dir.name + PARTIAL_SUFFIX)
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed export left
        partial.mkdir(parents=True)
        write_atomically(partial / CONFIG_FILE, json.dumps(source.config, indent=2, sort_keys=True) + "\n")
        write_safetensors(partial, source.layout, source.read)
        copy_text_files(text_files, partial)
        found = compare_logits(partial, checkpoint, source.model) if check_logits else None
        partial.rename(hf_dir)
        fsync_directory(hf_dir.parent)
    except OSError as error:
        raise storage_error(hf_dir, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return found


def open_checkpoint(checkpoint: Path, family_name: str | None) -> Source:
    """Verify a checkpoint and see it as a family's tensors.

    Raises:
        InputError: it holds no model that the family could say.
        CorruptCheckpointError: it is damaged.
    """
    state = verify(checkpoint, workers=os.cpu_count() or 1).state
    if "model" not in state or not (checkpoint / METADATA_FILE).exists():
        raise InputError(
            f"{checkpoint} was written by another engine or an older version: it does not say which model it "
            "holds. Resume the run for a step with engine.name=megatron and take its next checkpoint"
        )
    try:
        model = ModelSection.model_validate_json(json.dumps(state["model"]), strict=True)
    except ValidationError as error:
        raise InputError(f"{checkpoint}: its model cannot be read: {error}") from error
    origin: Any = state.get("huggingface") or {}
    family = _family(model, family_name or origin.get("family"))
    parts = bind(family.table(model), tensor_shapes(run_config(model, precision="fp32")), family.name)
    shards = ShardReader(checkpoint)
    _check_shapes(checkpoint, parts, shards)
    widened = origin.get("dtypes", {})
    layout = {
        name: (shape, widened.get(name) or _DTYPE_NAMES[shards.dtypes[part.key]])
        for part in parts
        for name, shape in part.theirs
    }
    copies = family.copies(model)
    copies = {name: copies[name] for name in origin.get("copies", copies)}
    layout |= {copy: layout[name] for copy, name in copies.items()}
    config = _config(family, model, origin.get("config"))
    config["dtype"] = str(shards.dtypes["embedding.word_embeddings.weight"]).removeprefix("torch.")
    return Source(
        model,
        family,
        config,
        layout,
        {name: (part, number) for part in parts for number, (name, _) in enumerate(part.theirs)},
        copies,
        tuple(part for part in parts if not part.theirs),
        shards,
    )


def _family(model: ModelSection, name: str | None) -> Family:
    """The one that is named, if it can say the model; else the only one that can."""
    if name is None:
        fitting = [family for family in FAMILIES.values() if not _unsaid(family, model)]
        if len(fitting) == 1:
            return fitting[0]
        names = [family.name for family in fitting] or list(FAMILIES)
        raise InputError(
            f"{'several families fit' if fitting else 'no family fits'} this model; "
            f"choose with --family among {', '.join(names)}"
        )
    family = family_named(name)
    unsaid = _unsaid(family, model)
    if unsaid:
        raise InputError(f"the family {name} cannot say this model: {unsaid}")
    return family


def _unsaid(family: Family, model: ModelSection) -> str:
    """What would be another model after an export and an import, in words; empty if nothing."""
    try:
        back = family.model_of(family.write_config(model))
    except InputError as error:
        return str(error)
    changed = differences(model, back)
    return "; ".join(
        f"model.{key}={ours} would be read as {theirs}" for key, (ours, theirs) in changed.items()
    )


def _config(family: Family, model: ModelSection, origin: dict[str, Any] | None) -> dict[str, Any]:
    """The config that the model was imported with, as long as it describes the model; else one of our own."""
    own = {"model_type": family.name, "architectures": [family.architecture], **family.write_config(model)}
    if origin is None or family_of_config(origin) is not family:
        return own
    same = not differences(model, family.model_of(origin))
    return dict(origin) if same else {**origin, **own}


def _check_shapes(checkpoint: Path, parts: Sequence[Part], shards: ShardReader) -> None:
    for part in parts:
        if shards.shapes.get(part.key) != part.whole_shape:
            raise InputError(
                f"{checkpoint}: {part.key} has the shape {shards.shapes.get(part.key)}, "
                f"the model that it describes needs {part.whole_shape}"
            )
