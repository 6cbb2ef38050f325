"""Megatron's model in this process alone, without an optimizer: to list its tensors or to run it once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from moe.config.schema import RunConfig
from moe.engine.without_cuda import without_cuda
from moe.model.build import assemble_model, load_weights, sharded_state
from moe.model.init import global_shapes


def tensor_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Checkpoint key and whole shape of every tensor of the model that a config describes; takes no memory.

    Raises:
        RuntimeError: this process is a rank of a job already.
    """
    with _groups_of_one() as groups, torch.device("meta"):
        return global_shapes(sharded_state(assemble_model(config, groups, num_microbatches=1)))


@torch.no_grad()
def logits_of(config: RunConfig, checkpoint: Path, tokens_BS: Tensor) -> Tensor:
    """Run a checkpoint's model on the CPU.

    Args:
        config: its model, and the precision to compute in.
        checkpoint: a verified folder of shards.
        tokens_BS: int64 ids.

    Returns:
        [B, S, V].

    Raises:
        RuntimeError: this process is a rank of a job already.
    """
    with _groups_of_one() as groups:
        model = assemble_model(config, groups, num_microbatches=1).eval()
        load_weights(model, checkpoint)
        positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
        logits_BSV: Tensor = model(tokens_BS, positions_BS, None)
        return logits_BSV


@contextmanager
def _groups_of_one() -> Iterator[ProcessGroupCollection]:
    """The process groups of a job of one rank, over gloo; left in order at the end."""
    with ExitStack() as undo:
        undo.enter_context(without_cuda())
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        undo.callback(dist.destroy_process_group)
        parallel_state.initialize_model_parallel()
        undo.callback(parallel_state.destroy_model_parallel)
        yield ProcessGroupCollection.use_mpu_process_groups()
