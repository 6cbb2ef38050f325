"""A Hugging Face folder becomes one of our checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe.config.schema import ModelSection
from moe.convert.families import family_of_config
from moe.convert.hf_reader import HfFolder, check_tensors
from moe.convert.logits import LogitCheck, compare_logits
from moe.convert.mapping import bind
from moe.convert.model_of import run_config
from moe.convert.text_files import text_files_of
from moe.convert.write_checkpoint import Incoming, refuse_existing, write_checkpoint
from moe.engine.one_rank import tensor_shapes


def import_hf(
    hf_dir: Path, checkpoint: Path, *, check_logits: bool, note: Callable[[str], None]
) -> LogitCheck | None:
    """Write a checkpoint that `train.init_from` starts from.

    No tensor is changed: each keeps its dtype. Memory holds no more than the largest tensor twice, but for
    the logit check, which holds both models.

    A tensor is told by its name and shape. One that stands transposed in a square matrix, or whose values
    are others, cannot be told from the right one by anybody who has this folder alone: transformers loads
    the same file. `moe convert check` against a second copy sees a single bit.

    Args:
        hf_dir: as `save_pretrained` writes it; of its files those that hold weights are read, those of the
            tokenizer copied.
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
    text_files = text_files_of(hf_dir)
    family = family_of_config(folder.config)
    model = _without_absent_predictions(folder, family.model_of(folder.config), note)
    parts = bind(family.table(model), tensor_shapes(run_config(model, precision="fp32")), family.name)
    copies = family.copies(model)
    check_tensors(folder, {name: shape for part in parts for name, shape in part.theirs}, copies)
    note(f"{hf_dir}: {family.name}, {len(folder.tensors):,} tensors, all as config.json says")
    incoming = Incoming(
        family=family,
        config=folder.config,
        model=model,
        parts=parts,
        dtypes={name: info.dtype for name, info in folder.tensors.items()},
        copies=[name for name in copies if name in folder.tensors],
        text_files=text_files,
        read=folder.read,
    )
    return write_checkpoint(
        checkpoint,
        incoming,
        lambda written: compare_logits(hf_dir, written, model) if check_logits else None,
    )


def _without_absent_predictions(
    folder: HfFolder, model: ModelSection, note: Callable[[str], None]
) -> ModelSection:
    """Transformers keeps the number of prediction layers in the config, but saves none of their tensors."""
    first = f"model.layers.{model.num_layers}."
    if model.mtp_layers == 0 or any(name.startswith(first) for name in folder.tensors):
        return model
    note(f"config.json counts {model.mtp_layers} layer(s) of multi-token prediction; the folder has none")
    return model.model_copy(update={"mtp_layers": 0})
