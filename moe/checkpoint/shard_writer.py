"""Writes Megatron's sharded state with torch's own DCP writer, in this process.

Megatron's default writer forks a process for each file and keeps a manager process beside every rank. A rank
that is killed leaves its manager behind, and a fork beside CUDA and threads is a gamble. On disk the format
is the same (`torch_dist`), so Megatron's loader reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from moe.durable import free_bytes
from moe.errors import InputError


class InProcessShardWriter(TorchDistSaveShardedStrategy):
    """A strategy for `dist_checkpointing.save`. It writes tensors only; see moe.model.build.sharded_state."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path | str) -> None:
        """Write this rank's main replicas into one file and rank 0 the `.metadata`; collective.

        Raises:
            InputError: a rank could not write; on every rank.
        """
        # From 0.19 Megatron hands over what is not sharded (for us nothing) as a pickle among the shards; up
        # to 0.16 it wrote `common.pt`, which every version reads.
        sharded_state_dict.pop("common_state", None)
        common = Path(checkpoint_dir) / COMMON_STATE_FNAME
        if dist.get_rank() == 0 and not common.exists():
            torch.save({}, common)
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        try:
            save(
                mcore_to_pyt_state_dict(tensors, False),
                storage_writer=FileSystemWriter(checkpoint_dir, sync_files=False),  # hashing syncs them
                planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            )
        except CheckpointException as error:  # a BaseException, which nobody above would see
            rank, (cause, _) = min(error.failures.items())
            # torch names no cause when the disk is full ("unexpected pos"), so the free space is told.
            raise InputError(
                f"rank {rank} cannot write its shard in {checkpoint_dir}: {cause}. "
                f"{free_bytes(Path(checkpoint_dir)):,} bytes are free there; earlier checkpoints are intact."
            ) from error
