"""Whether a checkpoint holds the model that a new run is to start from."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from moe.checkpoint.manifest import read_manifest
from moe.config.compare import differences
from moe.config.schema import ModelSection
from moe.errors import InputError


def check_initial_weights(checkpoint: Path, model: ModelSection) -> None:
    """Compare the model of a checkpoint with the run's; no tensor is read.

    Raises:
        InputError: they compute differently; the text names the keys.
        CorruptCheckpointError: the checkpoint's manifest is damaged.
    """
    state = read_manifest(checkpoint).state
    try:
        held = ModelSection.model_validate_json(json.dumps(state.get("model")), strict=True)
    except ValidationError as error:
        raise InputError(f"{checkpoint} does not say which model it holds: {error}") from error
    changed = differences(held, model)
    if changed:
        listed = "; ".join(
            f"model.{key} is {theirs}, {ours} there" for key, (ours, theirs) in changed.items()
        )
        raise InputError(
            f"train.init_from={checkpoint} holds another model: {listed}. "
            "Take the section `model` from its model.yaml"
        )
