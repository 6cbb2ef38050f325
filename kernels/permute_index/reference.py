"""Stable counting sort of expert ids, written to be obvious. N routed pairs, E experts."""

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
