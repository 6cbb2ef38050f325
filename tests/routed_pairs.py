"""Expert ids as routers give them, from even to extreme: cases that kernels of the expert path must pass."""

from __future__ import annotations

import torch
from torch import Tensor


def some_ids(num_tokens: int, num_experts: int, top_k: int, *, seed: int = 0) -> Tensor:
    """[T, K], different experts for each token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]


def with_sentinels(ids_TK: Tensor, every: int) -> Tensor:
    """Every so many pairs go nowhere: alternately -1 and an id far past the last expert."""
    ids_N = ids_TK.clone().flatten()
    ids_N[::every] = -1
    ids_N[:: 2 * every] = 10_000
    return ids_N.view_as(ids_TK)


# Name: number of experts, ids [T, K].
ROUTINGS = {
    "one_pair": (1, torch.tensor([[0]])),
    "one_expert": (1, some_ids(63, 1, 1)),
    "empty_ends": (3, torch.ones(7, 1, dtype=torch.int64)),
    "hot_expert": (4, torch.tensor([[2, 0]] + [[2, 3]] * 40 + [[1, 2]])),
    "uneven_16": (16, some_ids(31, 16, 3)),
    "all_experts": (4, some_ids(9, 4, 4)),
    "mostly_empty_37": (37, some_ids(8, 37, 2)),
    "sentinels": (5, with_sentinels(some_ids(37, 5, 2), 3)),
    "only_sentinels": (3, torch.full((4, 2), -1)),
    "no_tokens": (3, torch.empty(0, 2, dtype=torch.int64)),
}
