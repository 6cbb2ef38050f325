"""Checkpoints of the Megatron engine: weights and moments as parts of whole tensors, in any layout.

A rank has one or more chunks of the model. The keys of a checkpoint number the layers of the whole model, so
neither the layout nor the number of chunks shows in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer

from moe.checkpoint.shard_writer import InProcessShardWriter
from moe.engine.megatron_moments import create_moments, sharded_moments
from moe.engine.megatron_optimizer import parts_of
from moe.model.build import sharded_state
from moe.model.init import global_sizes


def count_parameters(models: Sequence[GPTModel]) -> int:
    """Parameters of the whole model: global shapes of all ranks' tensors, each key once; collective."""
    sizes = {key: size for model in models for key, size in global_sizes(sharded_state(model)).items()}
    gathered: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, sizes)
    return sum({key: size for part in gathered for key, size in part.items()}.values())


def save_state(models: Sequence[GPTModel], optimizer: MegatronOptimizer, directory: Path) -> None:
    """Write this rank's share of weights, expert biases and moments; collective."""
    state = _sharded(models, optimizer, is_loading=False)
    dist_checkpointing.save(state, str(directory), InProcessShardWriter())


def load_state(models: Sequence[GPTModel], optimizer: MegatronOptimizer, directory: Path, step: int) -> None:
    """Read what save_state wrote, in whatever layout; `step` is the updates so far; collective."""
    parts = parts_of(optimizer)
    moments = [state for part in parts for state in create_moments(part)]
    loaded = dist_checkpointing.load(_sharded(models, optimizer, is_loading=True), str(directory))
    for index, model in enumerate(models):
        model.load_state_dict(loaded["model"][str(index)])
    for index, part in enumerate(parts):
        # A stage without experts has an empty expert optimizer, of which a checkpoint may hold nothing.
        part.load_parameter_state_from_fully_reshardable(loaded["optimizer"].get(str(index), {}))
    # Updates so far, for Adam's bias correction. torch keeps them beside each parameter, not in the group
    # where Megatron's own state dict looks for them, so they travel in our manifest instead.
    for state in moments:
        state["step"] = torch.tensor(float(step))
    for part in parts:
        if not isinstance(part.optimizer, torch.optim.AdamW):
            # Apex's and Transformer Engine's FusedAdam, which Megatron prefers, count in the group.
            for group in part.optimizer.param_groups:
                group["step"] = step


def _sharded(models: Sequence[GPTModel], optimizer: MegatronOptimizer, *, is_loading: bool) -> dict[str, Any]:
    model_state = {str(index): sharded_state(model) for index, model in enumerate(models)}
    optimizer_state = {
        str(index): moments
        for index, part in enumerate(parts_of(optimizer))
        if (moments := sharded_moments(part, model_state, is_loading=is_loading))
    }
    # Not where it is empty: Megatron would take that for a value that all ranks should have in common.
    return {"model": model_state} | ({"optimizer": optimizer_state} if optimizer_state else {})
