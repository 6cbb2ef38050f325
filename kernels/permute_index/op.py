"""Stable counting sort of expert ids, and its padding to tiles: checks, then a backend.

Shapes: N routed pairs, E experts, P padded rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels.backend import choose_backend

# ends_E is int32, as grouped GEMMs take it.
MAX_PAIRS = 2**31 - 1


def permute_index(ids_N: Tensor, num_experts: int, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Where each routed pair goes in expert order.

    Args:
        ids_N: expert id of each pair, int64. An id outside [0, num_experts) is a sentinel, the padding of
            expert parallelism: it comes after all experts, in the order given, and no expert counts it.
        num_experts: E, at least 1.
        backend: `auto`, `triton` or `torch`; all give the same bits.

    Returns:
        order_N int64 (row i of expert order is pair order[i]); inverse_N int64 (pair n is at row inverse[n]);
        ends_E int32 (expert e owns the rows ends[e-1] to ends[e]), the offsets that grouped GEMMs take. Rows
        from ends[E-1] on are sentinels.

    Raises:
        ValueError: if ids are not a vector of int64 with fewer than 2**31 entries, there is no expert, or
            the backend cannot run here.
    """
    if ids_N.dim() != 1 or ids_N.dtype != torch.int64:
        raise ValueError(f"ids must be an int64 vector, got {ids_N.dtype} of shape {tuple(ids_N.shape)}")
    if ids_N.shape[0] > MAX_PAIRS:
        raise ValueError(
            f"ids must hold at most {MAX_PAIRS} pairs, got {ids_N.shape[0]}; use a smaller batch"
        )
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if choose_backend(backend, ids_N) == "torch":
        return _permute_index_torch(ids_N, num_experts)
    order_N, inverse_N, ends_E = _permute_index_triton(ids_N.contiguous(), num_experts)
    return order_N, inverse_N, ends_E


def pad_to_tiles(ends_E: Tensor, num_rows: int, tile: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Expert order with each expert's rows padded to whole tiles, so that no tile has rows of two experts.

    Args:
        ends_E: int32, of `permute_index`.
        num_rows: N, with sentinels if there are any. The device's counts are not read: P, the number of
            padded rows, is the most that N rows can need, (N + min(N, E) * (tile - 1)) rounded down to tiles.
        tile: rows of a tile, at least 1.
        backend: `auto`, `triton` or `torch`; all give the same bits.

    Returns:
        rows_P int64, the row of expert order at each padded row, -1 where there is none (sentinels have no
        padded row); padded_ends_E int32 (expert e owns the padded rows padded_ends[e-1] to padded_ends[e]).

    Raises:
        ValueError: if ends are not a vector of int32 with an entry, a number is out of range, or the backend
            cannot run here.
    """
    if ends_E.dim() != 1 or ends_E.dtype != torch.int32 or ends_E.shape[0] < 1:
        raise ValueError(
            f"ends must be an int32 vector of at least one expert, got {ends_E.dtype} "
            f"of shape {tuple(ends_E.shape)}"
        )
    if num_rows < 0 or tile < 1:
        raise ValueError(f"num_rows={num_rows} must be at least 0 and tile={tile} at least 1")
    num_padded = (num_rows + min(num_rows, ends_E.shape[0]) * (tile - 1)) // tile * tile
    if num_padded > MAX_PAIRS:
        raise ValueError(f"{num_rows} rows need up to {num_padded} padded ones, more than {MAX_PAIRS}")
    if choose_backend(backend, ends_E) == "torch":
        return _pad_to_tiles_torch(ends_E, num_padded, tile)
    rows_P, padded_ends_E = _pad_to_tiles_triton(ends_E.contiguous(), num_padded, tile)
    return rows_P, padded_ends_E


def _permute_index_torch(ids_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    is_expert_N = (ids_N >= 0) & (ids_N < num_experts)
    sorted_N, order_N = torch.sort(ids_N.where(is_expert_N, num_experts), stable=True)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(ids_N.numel(), device=ids_N.device)
    experts_E = torch.arange(num_experts, device=ids_N.device)
    ends_E = torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True)
    return order_N, inverse_N, ends_E


@torch.library.custom_op("joulemoe::permute_index", mutates_args=())
def _permute_index_triton(ids_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    # Not at the top: triton is imported where its kernels run, and exists on Linux only.
    from moe.kernels.permute_index.triton_kernel import permute_index_triton

    return permute_index_triton(ids_N, num_experts)


@_permute_index_triton.register_fake
def _(ids_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ends_E = ids_N.new_empty(num_experts, dtype=torch.int32)
    return torch.empty_like(ids_N), torch.empty_like(ids_N), ends_E


def _pad_to_tiles_torch(ends_E: Tensor, num_padded: int, tile: int) -> tuple[Tensor, Tensor]:
    ends_E = ends_E.long()
    starts_E = ends_E.roll(1).index_fill(0, ends_E.new_zeros(1), 0)
    padded_E = (ends_E - starts_E + tile - 1) // tile * tile
    padded_ends_E = padded_E.cumsum(0)
    place_P = torch.arange(num_padded, device=ends_E.device)
    expert_P = torch.searchsorted(padded_ends_E, place_P, right=True).clamp(max=ends_E.shape[0] - 1)
    rows_P = place_P + (starts_E - (padded_ends_E - padded_E))[expert_P]
    return rows_P.where(rows_P < ends_E[expert_P], -1), padded_ends_E.int()


@torch.library.custom_op("joulemoe::pad_to_tiles", mutates_args=())
def _pad_to_tiles_triton(ends_E: Tensor, num_padded: int, tile: int) -> tuple[Tensor, Tensor]:
    from moe.kernels.permute_index.triton_kernel import pad_to_tiles_triton

    return pad_to_tiles_triton(ends_E, num_padded, tile)


@_pad_to_tiles_triton.register_fake
def _(ends_E: Tensor, num_padded: int, tile: int) -> tuple[Tensor, Tensor]:
    return ends_E.new_empty(num_padded, dtype=torch.int64), torch.empty_like(ends_E)
