"""Writes Megatron's sharded state with torch's own DCP writer, in this process.

Megatron's default writer forks a process for each file and keeps a manager process beside every rank; a rank that
is killed leaves its manager behind, and a fork in a process with CUDA and threads is a gamble. The format on disk
is the same (`torch_dist`), so Megatron's loader reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as dcp


class InProcessShardWriter(SaveShardedStrategy):
    """A strategy for `dist_checkpointing.save`."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Only tensors are saved; see MegatronEngine."""
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path | str) -> None:
        """Write this rank's main replicas into one file and rank 0 the `.metadata`; collective.

        Raises:
            torch.distributed.checkpoint.api.CheckpointException: a rank could not write; on every rank. It derives
                from BaseException.
        """
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        dcp.save(
            mcore_to_pyt_state_dict(tensors, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, sync_files=False),  # hashing syncs them
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
