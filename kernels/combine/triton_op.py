"""The Triton backend as custom operators, for torch.compile to trace.

Shapes: T tokens, K top-k, N = T*K routed pairs, D model. The kernels need no order: the inverse
says as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def permute_triton(x_TD: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
    """Contract of `permute`, whose checks have passed. Saves the inverse only."""
    out_ND: Tensor = _permute(x_TD, inverse_N, top_k)
    return out_ND


def unpermute_triton(y_ND: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
    """Contract of `unpermute`, whose checks have passed. Saves the inverse only."""
    out_TD: Tensor = _unpermute(y_ND, inverse_N, top_k)
    return out_TD


def combine_triton(y_ND: Tensor, weights_TK: Tensor, inverse_N: Tensor) -> Tensor:
    """Contract of `combine`, whose checks have passed. Saves its three inputs, no row twice."""
    out_TD: Tensor = _combine(y_ND, weights_TK, inverse_N)
    return out_TD


@torch.library.custom_op("joulemoe::permute", mutates_args=())
def _permute(x_TD: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
    # Not at the top: triton is imported where its kernels run, and exists on Linux only.
    from moe.kernels.combine.triton_kernel import copy_rows

    return copy_rows(x_TD.contiguous(), inverse_N.contiguous(), top_k)


@_permute.register_fake
def _(x_TD: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0] * top_k, x_TD.shape[1])


@torch.library.custom_op("joulemoe::unpermute", mutates_args=())
def _unpermute(y_ND: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
    from moe.kernels.combine.triton_kernel import sum_rows

    return sum_rows(y_ND.contiguous(), None, inverse_N.contiguous(), top_k)


@_unpermute.register_fake
def _(y_ND: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
    return y_ND.new_empty(y_ND.shape[0] // top_k, y_ND.shape[1])


@torch.library.custom_op("joulemoe::combine", mutates_args=())
def _combine(y_ND: Tensor, weights_TK: Tensor, inverse_N: Tensor) -> Tensor:
    from moe.kernels.combine.triton_kernel import sum_rows

    top_k = weights_TK.shape[1]
    return sum_rows(y_ND.contiguous(), weights_TK.contiguous(), inverse_N.contiguous(), top_k)


@_combine.register_fake
def _(y_ND: Tensor, weights_TK: Tensor, inverse_N: Tensor) -> Tensor:
    return y_ND.new_empty(weights_TK.shape[0], y_ND.shape[1])


@torch.library.custom_op("joulemoe::combine_backward", mutates_args=())
def _combine_backward(
    grad_TD: Tensor, y_ND: Tensor, weights_TK: Tensor, inverse_N: Tensor
) -> tuple[Tensor, Tensor]:
    from moe.kernels.combine.triton_kernel import combine_bwd

    return combine_bwd(
        grad_TD.contiguous(), y_ND.contiguous(), weights_TK.contiguous(), inverse_N.contiguous()
    )


@_combine_backward.register_fake
def _(grad_TD: Tensor, y_ND: Tensor, weights_TK: Tensor, inverse_N: Tensor) -> tuple[Tensor, Tensor]:
    return y_ND.new_empty(y_ND.shape), weights_TK.new_empty(weights_TK.shape)


# Each of the two is the other's transpose.
def _save_inverse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, inverse_N, ctx.top_k = inputs
    ctx.save_for_backward(inverse_N)


def _permute_gradient(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
    (inverse_N,) = ctx.saved_tensors
    return _unpermute(grad_ND, inverse_N, ctx.top_k), None, None


def _unpermute_gradient(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    (inverse_N,) = ctx.saved_tensors
    return _permute(grad_TD, inverse_N, ctx.top_k), None, None


def _save_for_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_gradient(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    grad_y_ND, grad_weights_TK = _combine_backward(grad_TD, *ctx.saved_tensors)
    return grad_y_ND, grad_weights_TK, None


_permute.register_autograd(_permute_gradient, setup_context=_save_inverse)
_unpermute.register_autograd(_unpermute_gradient, setup_context=_save_inverse)
_combine.register_autograd(_combine_gradient, setup_context=_save_for_combine)
