"""Grouped GEMM: the public function, its checks, and the custom operators.

Shapes: T tokens, R rows in expert order, D and F columns, e experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe.kernels.backend import choose_backend
from moe.kernels.combine import unpermute
from moe.kernels.grouped_gemm.torch_backend import grouped_gemm_torch, grouped_wgrad_torch

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_gemm(
    x_TD: Tensor,
    w_eFD: Tensor,
    ends_e: Tensor,
    *,
    gather: tuple[Tensor, Tensor] | None = None,
    top_k: int = 1,
    main_grad_eFD: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """out[r] = x[r] @ w[expert of r]^T, each expert's rows together; differentiable in x and w.

    Args:
        x_TD: rows in expert order; with `gather`, one row a token.
        w_eFD: a weight an expert.
        ends_e: int32, expert i owns rows ends[i-1] to ends[i]. An expert without rows gets zero gradients.
        gather: order and inverse of `permute_index`: row r is x[order[r] // top_k], gathered as it is loaded.
        top_k: rows a token, with `gather`.
        main_grad_eFD: the backward adds the weight's gradient to it, in its own dtype (fp32 for a master
            gradient that sums micro-batches), and gives w no gradient. Not under torch.compile.
        backend: `auto` (triton on CUDA, torch elsewhere), `triton` or `torch`.

    Returns:
        out_RF in x's dtype, sums in fp32. Rows from ends[-1] on belong to no expert: their values mean
        nothing, and their gradients count as zeros.

    Raises:
        ValueError: for shapes or dtypes that do not fit together, or a backend that cannot run here.
    """
    chosen = choose_backend(backend, x_TD)
    order_R, inverse_R = gather or (None, None)
    num_rows = x_TD.shape[0] * top_k
    _check(x_TD, w_eFD, ends_e, main_grad_eFD, chosen)
    for name, tensor in (("order", order_R), ("inverse", inverse_R)):
        if tensor is not None and tensor.shape != (num_rows,):
            raise ValueError(f"{name} must hold {num_rows} rows, got shape {tuple(tensor.shape)}")
    if gather is None and top_k != 1:
        raise ValueError(f"top_k={top_k} needs gather, the order and inverse of permute_index")
    out_RF: Tensor = _forward(x_TD, w_eFD, ends_e, order_R, inverse_R, main_grad_eFD, top_k, chosen)
    return out_RF


def _check(x_TD: Tensor, w_eFD: Tensor, ends_e: Tensor, main_grad_eFD: Tensor | None, backend: str) -> None:
    if x_TD.dim() != 2 or w_eFD.dim() != 3 or x_TD.shape[1] != w_eFD.shape[2]:
        raise ValueError(
            f"expected x [T, D] and w [e, F, D], got {tuple(x_TD.shape)} and {tuple(w_eFD.shape)}"
        )
    if ends_e.shape != (w_eFD.shape[0],) or ends_e.dtype != torch.int32:
        raise ValueError(
            f"ends must be int32 of shape [{w_eFD.shape[0]}], got {ends_e.dtype} {tuple(ends_e.shape)}"
        )
    if x_TD.dtype != w_eFD.dtype:
        raise ValueError(f"one dtype is needed, got x {x_TD.dtype} and w {w_eFD.dtype}")
    if backend == "triton" and x_TD.dtype not in TRITON_DTYPES:
        allowed = ", ".join(map(str, TRITON_DTYPES))
        raise ValueError(f"backend='triton' takes {allowed}, got {x_TD.dtype}; use backend='torch'")
    if main_grad_eFD is not None and main_grad_eFD.shape != w_eFD.shape:
        raise ValueError(
            f"main_grad must have the weight's shape {tuple(w_eFD.shape)}, got {tuple(main_grad_eFD.shape)}"
        )


@torch.library.custom_op("joulemoe::grouped_gemm", mutates_args=())
def _forward(  # noqa: PLR0917 - an operator's schema
    x_TD: Tensor,
    w_eFD: Tensor,
    ends_e: Tensor,
    order_R: Tensor | None,
    inverse_R: Tensor | None,
    main_grad_eFD: Tensor | None,
    top_k: int,
    backend: str,
) -> Tensor:
    """The last two tensors wait for the backward."""
    return _product(x_TD, w_eFD, ends_e, order_R, top_k, w_is_nk=True, backend=backend)


@_forward.register_fake
def _(x_TD: Tensor, w_eFD: Tensor, _ends: Tensor, order_R: Tensor | None, *_: object) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0] if order_R is None else order_R.shape[0], w_eFD.shape[1])


@torch.library.custom_op("joulemoe::grouped_gemm_dgrad", mutates_args=())
def _dgrad(grad_RF: Tensor, w_eFD: Tensor, ends_e: Tensor, backend: str) -> Tensor:
    """Gradient of each row before its gathering; zeros in rows of no expert."""
    grad_RD = _product(grad_RF, w_eFD, ends_e, None, 1, w_is_nk=False, backend=backend)
    is_expert_R = torch.arange(grad_RF.shape[0], device=grad_RF.device) < ends_e[-1]
    return grad_RD.where(is_expert_R.unsqueeze(1), 0)


@_dgrad.register_fake
def _(grad_RF: Tensor, w_eFD: Tensor, *_: object) -> Tensor:
    return grad_RF.new_empty(grad_RF.shape[0], w_eFD.shape[2])


@torch.library.custom_op("joulemoe::grouped_gemm_wgrad", mutates_args=())
def _wgrad(  # noqa: PLR0917 - an operator's schema
    grad_RF: Tensor, x_TD: Tensor, ends_e: Tensor, order_R: Tensor | None, top_k: int, backend: str
) -> Tensor:
    """Gradient of the weights."""
    return _weight_gradient(grad_RF, x_TD, ends_e, order_R, top_k, backend=backend, accumulate_into=None)


@_wgrad.register_fake
def _(grad_RF: Tensor, x_TD: Tensor, ends_e: Tensor, *_: object) -> Tensor:
    return x_TD.new_empty(ends_e.shape[0], grad_RF.shape[1], x_TD.shape[1])


def _product(
    a: Tensor,
    w: Tensor,
    ends_e: Tensor,
    order_R: Tensor | None,
    top_k: int,
    *,
    w_is_nk: bool,
    backend: str,
) -> Tensor:
    if backend == "torch":
        w_eKN = w.transpose(1, 2) if w_is_nk else w
        return grouped_gemm_torch(a, w_eKN, ends_e, order_R, top_k)
    # Not at the top: triton is imported where its kernels run, and exists on Linux only.
    from moe.kernels.grouped_gemm.triton_kernel import TileMaps, launch_grouped_gemm

    num_rows = a.shape[0] if order_R is None else order_R.shape[0]
    maps = TileMaps(ends_e.contiguous(), num_rows)
    return launch_grouped_gemm(
        a.contiguous(), w.contiguous(), maps, w_is_nk=w_is_nk, order_R=order_R, top_k=top_k
    )


def _weight_gradient(
    grad_RF: Tensor,
    x_TD: Tensor,
    ends_e: Tensor,
    order_R: Tensor | None,
    top_k: int,
    *,
    backend: str,
    accumulate_into: Tensor | None,
) -> Tensor:
    if backend == "torch":
        grad_eFD = grouped_wgrad_torch(grad_RF, x_TD, ends_e, order_R, top_k)
        return grad_eFD if accumulate_into is None else accumulate_into.add_(grad_eFD)
    from moe.kernels.grouped_gemm.triton_kernel import TileMaps, launch_grouped_wgrad

    return launch_grouped_wgrad(
        grad_RF.contiguous(),
        x_TD.contiguous(),
        TileMaps(ends_e.contiguous(), grad_RF.shape[0]),
        order_right_R=order_R,
        top_k=top_k,
        accumulate_into=accumulate_into,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TD, w_eFD, ends_e, order_R, inverse_R, ctx.main_grad_eFD, ctx.top_k, ctx.backend = inputs
    ctx.save_for_backward(x_TD, w_eFD, ends_e, order_R, inverse_R)


def _gradient(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, ...]:
    x_TD, w_eFD, ends_e, order_R, inverse_R = ctx.saved_tensors
    top_k, backend = ctx.top_k, ctx.backend
    grad_x, grad_w = None, None
    if ctx.needs_input_grad[0]:
        grad_x = _dgrad(grad_RF, w_eFD, ends_e, backend)
        if order_R is not None:
            grad_x = unpermute(grad_x, order_R, inverse_R, top_k, backend=backend)
    if ctx.main_grad_eFD is not None:
        into = ctx.main_grad_eFD
        _weight_gradient(grad_RF, x_TD, ends_e, order_R, top_k, backend=backend, accumulate_into=into)
    elif ctx.needs_input_grad[1]:
        grad_w = _wgrad(grad_RF, x_TD, ends_e, order_R, top_k, backend)
    return grad_x, grad_w, None, None, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)
