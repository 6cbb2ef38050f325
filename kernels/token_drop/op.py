"""Token rounding and expert capacity: sorts, gathers and `permute_index`, the same on every device.

Shapes: T tokens, K top-k, N = T*K routed pairs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe.kernels.permute_index import permute_index

ROUNDINGS = ("down", "nearest")


def token_rounding(
    ids_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    tile: int,
    *,
    rounding: str = "nearest",
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the pairs that would leave an expert's last tile of rows mostly empty.

    After SonicMoE's token rounding (arXiv 2512.14080), the part of it that only drops. Of an expert that c
    pairs chose, the rest r = c mod tile is dropped:

    down       always: every count becomes a multiple of the tile, and an expert below one tile gets nothing.
    nearest    where 2 r < tile, as there. Where 2 r >= tile the paper adds tokens that did not choose the
               expert; a token has K pairs here and no place for another, so the expert keeps its c pairs, and
               its last tile is at least half full.

    Dropped are the pairs with the least weights, of equal ones those of later tokens. A token loses what its
    dropped experts would have added: the weights that stay are not renormalised. A training-time choice:
    which pairs stay depends on the other tokens of the batch, later ones included.

    Args:
        ids_TK: int64; ids outside [0, E) are sentinels, which no expert counts.
        weights_TK: combine weights. Gradients flow to those that stay.
        num_experts: E.
        tile: rows of a tile of the grouped GEMM.
        rounding: `nearest` or `down`.
        backend: of `permute_index`; all give the same bits.

    Returns:
        ids_TK with -1 for each pair dropped (and each sentinel), weights_TK with 0 there, and the counts_E
        int64 that are left.

    Raises:
        ValueError: if shapes differ, there is no expert, the tile or the rounding is none, or the backend
            cannot run here.
    """
    if tile < 1:
        raise ValueError(f"tile={tile} must be at least 1")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r} is unknown; allowed: {', '.join(ROUNDINGS)}")

    def rounded(counts_E: Tensor) -> Tensor:
        rest_E = counts_E % tile
        if rounding == "nearest":
            rest_E = rest_E.where(2 * rest_E < tile, 0)
        return counts_E - rest_E

    return _keep_best(ids_TK, weights_TK, num_experts, rounded, backend)


def capacity_limit(
    ids_TK: Tensor, weights_TK: Tensor, num_experts: int, capacity: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop what an expert gets beyond its capacity (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961).

    Dropped are the pairs with the least weights, of equal ones those of later tokens (those papers drop by
    position). The weights that stay are not renormalised.

    Args:
        ids_TK: int64; ids outside [0, E) are sentinels, which no expert counts.
        weights_TK: combine weights. Gradients flow to those that stay.
        num_experts: E.
        capacity: pairs that an expert keeps at most.
        backend: of `permute_index`; all give the same bits.

    Returns:
        As `token_rounding`.

    Raises:
        ValueError: if shapes differ, there is no expert, the capacity is negative, or the backend cannot run
            here.
    """
    if capacity < 0:
        raise ValueError(f"capacity={capacity} must be 0 or more")
    return _keep_best(ids_TK, weights_TK, num_experts, lambda counts_E: counts_E.clamp(max=capacity), backend)


def _keep_best(
    ids_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    kept_of: Callable[[Tensor], Tensor],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each expert keeps kept_of(its count) pairs, those with the largest weights."""
    if ids_TK.dim() != 2 or ids_TK.shape != weights_TK.shape:
        raise ValueError(
            f"ids and weights must both be [T, K], got {tuple(ids_TK.shape)} and {tuple(weights_TK.shape)}"
        )
    best_first_N = torch.sort(weights_TK.detach().flatten(), descending=True, stable=True).indices
    ids_N = ids_TK.flatten()[best_first_N]
    _, row_N, ends_E = permute_index(ids_N, num_experts, backend=backend)
    starts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    counts_E = kept_of((ends_E - starts_E).long())
    is_expert_N = (ids_N >= 0) & (ids_N < num_experts)
    expert_N = ids_N.where(is_expert_N, 0)
    # Among the pairs of an expert the stable sort keeps the best first: a row says how many are better.
    kept_N = is_expert_N & (row_N - starts_E[expert_N] < counts_E[expert_N])
    kept_TK = torch.empty_like(kept_N).scatter(0, best_first_N, kept_N).view(ids_TK.shape)
    return ids_TK.where(kept_TK, -1), weights_TK.where(kept_TK, 0), counts_E
