"""Initial weights that do not depend on the layout: every element is a function of (seed, name, place).

A tensor is drawn in blocks of rows, each from its own generator, so a rank draws only the blocks that it
holds: a trillion-parameter model starts without any rank ever holding a full tensor, and tp=2 ep=4 starts
from the very weights of a single rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

BLOCK_ELEMENTS = 1 << 20  # elements a generator draws; bounds memory, and seeding costs nothing beside it

# Projections back into the residual stream; scaled down with depth (GPT-2, section 2.3).
OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight", "w_down_eDF")


@torch.no_grad()
def init_weights(sharded_state: Mapping[str, Any], *, seed: int, std: float, num_layers: int) -> None:
    """Fill every parameter of a model in place.

    Args:
        sharded_state: the model's sharded_state_dict; its tensors are the parameters themselves.
        seed: the run's.
        std: of the normal distribution of matrices; norms become 1, biases 0.
        num_layers: scales the output projections by 1 / sqrt(2 * num_layers).
    """
    for shard in _shards(sharded_state):
        key = shard.key
        if key.endswith("norm.weight"):
            shard.data.fill_(1.0)
        elif key.endswith(("bias", "bias_E", "b_E", "b_gate_up_eG", "b_down_eD")):
            shard.data.zero_()
        else:
            scale = 1.0 / math.sqrt(2 * num_layers) if key.endswith(OUTPUT_PROJECTIONS) else 1.0
            shard.data.copy_(
                seeded_normal(key, shard.global_shape, shard.global_offset, shard.local_shape, seed)
            )
            shard.data.mul_(std * scale)


def mark_tensor_parallel(model: nn.Module) -> None:
    """Tell Megatron which weights are split over tp, so that the gradient norm counts each element once.

    Megatron sets these marks only in its own initialisation, which init_weights replaces.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding | RowParallelLinear):
            split_dim = 1 if isinstance(module, RowParallelLinear) else 0
            if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=split_dim, stride=1)


def global_shapes(sharded_state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each whole tensor that this rank holds a part of, by checkpoint key."""
    return {shard.key: shard.global_shape for shard in _shards(sharded_state)}


def global_sizes(sharded_state: Mapping[str, Any]) -> dict[str, int]:
    """Number of elements of each whole parameter that this rank holds a part of, by checkpoint key."""
    shapes = global_shapes(sharded_state)
    return {key: math.prod(shape) for key, shape in shapes.items() if not key.endswith("bias_E")}  # a buffer


def _shards(sharded_state: Mapping[str, Any]) -> Iterator[ShardedTensor]:
    for value in nested_values(sharded_state):
        if isinstance(value, ShardedTensorFactory):
            yield from (v for v in nested_values(value.build()) if isinstance(v, ShardedTensor))
        elif isinstance(value, ShardedTensor):
            yield value


def seeded_normal(
    name: str, global_shape: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...], seed: int
) -> Tensor:
    """The part [offset, offset + shape) of the normal fp32 tensor that belongs to (seed, name)."""
    row_elements = math.prod(global_shape[1:])
    block_rows = max(1, BLOCK_ELEMENTS // row_elements)
    out = torch.empty(shape, dtype=torch.float32)
    columns = tuple(slice(o, o + s) for o, s in zip(offset[1:], shape[1:], strict=True))
    start, end = offset[0], offset[0] + shape[0]
    for block in range(start // block_rows, -(-end // block_rows)):
        first = block * block_rows
        rows = min(block_rows, global_shape[0] - first)
        generator = torch.Generator().manual_seed(_seed_of(seed, name, block))
        values = torch.randn(rows, *global_shape[1:], generator=generator)
        low, high = max(start, first), min(end, first + rows)
        out[low - start : high - start] = values[(slice(low - first, high - first), *columns)]
    return out


def _seed_of(seed: int, name: str, block: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
