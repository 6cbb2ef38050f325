"""Stable counting sort of expert ids and its padding, written to be obvious. N routed pairs, E experts."""

from __future__ import annotations

import torch
from torch import Tensor


def permute_index_reference(ids_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `permute_index`, with Python lists."""
    ids = ids_N.tolist()
    experts = range(num_experts)
    order = [n for e in experts for n in range(len(ids)) if ids[n] == e]
    order += [n for n in range(len(ids)) if ids[n] not in experts]  # sentinels come last
    inverse = [0] * len(ids)
    for position, n in enumerate(order):
        inverse[n] = position
    ends = [sum(1 for i in ids if 0 <= i <= e) for e in experts]
    return (
        torch.tensor(order, dtype=torch.int64, device=ids_N.device),
        torch.tensor(inverse, dtype=torch.int64, device=ids_N.device),
        torch.tensor(ends, dtype=torch.int32, device=ids_N.device),
    )


def pad_to_tiles_reference(ends_E: Tensor, num_rows: int, tile: int) -> tuple[Tensor, Tensor]:
    """Same contract as `pad_to_tiles`, with Python lists."""
    rows: list[int] = []
    padded_ends = []
    start = 0
    for end in ends_E.tolist():
        rows += range(start, end)
        rows += [-1] * (-len(rows) % tile)
        padded_ends.append(len(rows))
        start = end
    most = (num_rows + min(num_rows, len(padded_ends)) * (tile - 1)) // tile * tile
    rows += [-1] * (most - len(rows))
    return (
        torch.tensor(rows, dtype=torch.int64, device=ends_E.device),
        torch.tensor(padded_ends, dtype=torch.int32, device=ends_E.device),
    )
