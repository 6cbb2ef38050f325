"""Into expert order and back in plain torch: gathers, no scatter. T tokens, K top-k, N = T*K, D model."""

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


def permute_torch(x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
    """Contract of `permute`, whose checks have passed."""
    out: Tensor = _Permute.apply(x_TD, order_N, inverse_N, top_k)  # type: ignore[no-untyped-call]
    return out


def unpermute_torch(y_ND: Tensor, order_N: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
    """Contract of `unpermute`, whose checks have passed."""
    # The same Function with K = 1: a permutation whose gradient is a gather too.
    out_TD: Tensor = permute_torch(y_ND, inverse_N, order_N, 1).unflatten(0, (-1, top_k)).sum(dim=1)
    return out_TD


def combine_torch(y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    """Contract of `combine`, whose checks have passed."""
    y_NKD = permute_torch(y_ND, inverse_N, order_N, 1).unflatten(0, weights_TK.shape)
    # fp32 weights widen bf16 rows as they are multiplied; float64 stays float64.
    y_TD: Tensor = (y_NKD * weights_TK.unsqueeze(-1)).sum(dim=1)
    return y_TD.to(y_ND.dtype)
