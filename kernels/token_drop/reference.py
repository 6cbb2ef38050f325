"""Token rounding and expert capacity, one expert at a time: the oracle. T tokens, K top-k, E experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def token_rounding_reference(
    ids_TK: Tensor, weights_TK: Tensor, num_experts: int, tile: int, *, rounding: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `token_rounding`, with Python lists."""

    def rounded(count: int) -> int:
        rest = count % tile
        return count if rounding == "nearest" and 2 * rest >= tile else count - rest

    return _keep_best(ids_TK, weights_TK, num_experts, rounded)


def capacity_limit_reference(
    ids_TK: Tensor, weights_TK: Tensor, num_experts: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `capacity_limit`, with Python lists."""
    return _keep_best(ids_TK, weights_TK, num_experts, lambda count: min(count, capacity))


def _keep_best(
    ids_TK: Tensor, weights_TK: Tensor, num_experts: int, kept_of: Callable[[int], int]
) -> tuple[Tensor, Tensor, Tensor]:
    ids, weights = ids_TK.flatten().tolist(), weights_TK.flatten().tolist()
    kept = torch.zeros(len(ids), dtype=torch.bool)
    counts = []
    for e in range(num_experts):
        pairs = [n for n in range(len(ids)) if ids[n] == e]
        best_first = sorted(pairs, key=lambda n: (-weights[n], n))
        counts.append(kept_of(len(pairs)))
        kept[best_first[: counts[-1]]] = True
    kept_TK = kept.view(ids_TK.shape).to(ids_TK.device)
    counts_E = torch.tensor(counts, dtype=torch.int64, device=ids_TK.device)
    return ids_TK.where(kept_TK, -1), weights_TK.where(kept_TK, 0), counts_E
