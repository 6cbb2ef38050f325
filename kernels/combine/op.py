"""Into expert order and back, deterministic in both directions: gathers only, no scatter, no atomics.

Shapes: T tokens, K top-k, N = T*K routed pairs (pair n belongs to token n // K), D model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Permute(torch.autograd.Function):
    """out[i] = x[order[i] // K]; the gradient of a token is the sum over its K rows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.top_k = top_k
        return x_TD.index_select(0, order_N // top_k)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_N,) = ctx.saved_tensors
        grad_NKD = grad_ND.index_select(0, inverse_N).unflatten(0, (-1, ctx.top_k))
        return grad_NKD.sum(dim=1), None, None, None


def permute(x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
    """Rows of x in expert order, each token K times; order and inverse from `permute_index`."""
    _check(order_N, inverse_N, x_TD.shape[0] * top_k)
    out: Tensor = _Permute.apply(x_TD, order_N, inverse_N, top_k)  # type: ignore[no-untyped-call]
    return out


def combine(y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    """Sum of each token's K expert outputs, weighted.

    Args:
        y_ND: expert outputs in expert order.
        weights_TK: fp32; the sum is taken in fp32 and returned in y's dtype.
        order_N: pair at each row of expert order, from `permute_index`.
        inverse_N: row of each pair, likewise.

    Raises:
        ValueError: if the lengths do not fit, or weights are coarser than fp32.
    """
    T, K = weights_TK.shape
    _check(order_N, inverse_N, T * K)
    if weights_TK.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weights must be fp32, as topk_route gives them, got {weights_TK.dtype}")
    # The same Function with K = 1: a permutation whose gradient is a gather too.
    y_NKD = permute(y_ND, inverse_N, order_N, 1).unflatten(0, (T, K))
    # fp32 weights widen bf16 rows as they are multiplied; float64 stays float64.
    y_TD: Tensor = (y_NKD * weights_TK.unsqueeze(-1)).sum(dim=1)
    return y_TD.to(y_ND.dtype)


def _check(order_N: Tensor, inverse_N: Tensor, num_rows: int) -> None:
    if order_N.shape != (num_rows,) or inverse_N.shape != (num_rows,):
        raise ValueError(
            f"order and inverse must hold {num_rows} rows, "
            f"got {tuple(order_N.shape)} and {tuple(inverse_N.shape)}"
        )
