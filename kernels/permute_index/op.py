"""Stable counting sort of expert ids: checks, then the torch backend. N routed pairs, E experts."""

from __future__ import annotations

import torch
from torch import Tensor


def permute_index(ids_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each routed pair goes in expert order.

    Args:
        ids_N: expert id of each pair, int64 in [0, num_experts).
        num_experts: E.

    Returns:
        order_N int64 (row i of expert order is pair order[i]); inverse_N int64 (pair n is at row inverse[n]);
        ends_E int32 (expert e owns the rows ends[e-1] to ends[e]), the offsets that grouped GEMMs take.

    Raises:
        ValueError: if ids are not a vector of int64.
    """
    if ids_N.dim() != 1 or ids_N.dtype != torch.int64:
        raise ValueError(f"ids must be an int64 vector, got {ids_N.dtype} of shape {tuple(ids_N.shape)}")
    sorted_N, order_N = torch.sort(ids_N, stable=True)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(ids_N.numel(), device=ids_N.device)
    experts_E = torch.arange(num_experts, device=ids_N.device)
    ends_E = torch.searchsorted(sorted_N, experts_E, right=True).to(torch.int32)
    return order_N, inverse_N, ends_E
