"""Stable counting sort of expert ids: checks, then a backend. N routed pairs, E experts."""

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
