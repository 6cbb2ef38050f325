"""A layer's experts as parts of whole tensors, as checkpoints and initial weights see them.

Expert-parallel ranks share them out by expert, expert-tensor-parallel ranks along the hidden size F. Gate and
up projection lie one after the other in one tensor; of a split expert a rank has rows of both, two parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

Offset = tuple[int, int, int]  # axis, this rank's part of it, number of parts

# The dimension that expert-tensor-parallel ranks share out.
SPLIT_DIM = {"w_gate_up_eGD": 1, "w_down_eDF": 2, "b_gate_up_eG": 1, "b_down_eD": 1}
_STACKED = ("w_gate_up_eGD", "b_gate_up_eG")


def expert_shards(
    experts: Mapping[str, Tensor],
    prefix: str,
    offsets: tuple[Offset, ...],
    *,
    ep: dist.ProcessGroup,
    etp: dist.ProcessGroup,
    expert_dp: dist.ProcessGroup,
) -> dict[str, Any]:
    """By checkpoint key.

    Args:
        experts: parameters of moe.layer.GroupedExperts by name.
        prefix: of the keys.
        offsets: of this layer in axes that come before.
        ep: ranks with other experts.
        etp: ranks with other parts of the same ones.
        expert_dp: ranks with the same parts.
    """
    replica = (0, 0, expert_dp.rank())
    axis = len(offsets)
    by_expert = (*offsets, (axis, ep.rank(), ep.size()))
    shards: dict[str, Any] = {}
    for name, tensor in experts.items():
        key = prefix + name
        if name in _STACKED and etp.size() > 1:
            build = partial(_gate_and_up, by_expert, etp)
            shards[key] = ShardedTensorFactory(key, tensor, build, partial(torch.cat, dim=1), replica)
        else:
            part = (axis + SPLIT_DIM[name], etp.rank(), etp.size())
            shards[key] = ShardedTensor.from_rank_offsets(
                key, tensor, *by_expert, part, replica_id=replica, prepend_axis_num=axis
            )
    return shards


def _gate_and_up(
    by_expert: tuple[Offset, ...],
    etp: dist.ProcessGroup,
    key: str,
    tensor: Tensor,
    replica: tuple[int, int, int],
    _flattened: slice | None,
) -> list[ShardedTensor]:
    """Both parts of a tensor of the parameter's shape: itself, its main copy or a moment."""
    axis, ranks = len(by_expert) - 1, etp.size()
    return [
        ShardedTensor.from_rank_offsets(
            key,
            half,
            *by_expert,
            (axis + 1, place * ranks + etp.rank(), 2 * ranks),
            replica_id=replica,
            prepend_axis_num=axis,
        )
        for place, half in enumerate(tensor.chunk(2, dim=1))
    ]
