"""Rows into expert order and back, each direction one Triton kernel; no atomics, bit-equal reruns.

Shapes: T tokens, K top-k, N = T*K routed pairs, D model. Every program takes a block of tokens and goes from
pair to row by inverse_N, so that a token's own row moves once and only the K rows of its pairs move K times.
Where rows are written, inverse_N is a permutation: each row has one writer. Sums are in fp32, k ascending.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: PLR0917
# Triton has no types: its kernels take pointers and blocks that exist on the device only.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
# Eight elements a thread: one 128-bit access in bf16, two in fp32.
TILE = 1024

# The number of tokens changes from step to step: one binary serves all of them.
jit_for_any_size = triton.jit(do_not_specialize=["T"])


@triton.jit
def _tokens(T, BLOCK_T: tl.constexpr):
    """Ids of the program's tokens in int64, and which of them exist."""
    o_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    return o_T, o_T < T


@jit_for_any_size
def copy_rows_kernel(
    p_x,
    p_inverse,
    p_out,
    T,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[inverse[t, k]] = x[t]. Grid: blocks of tokens, blocks of columns."""
    o_T, in_T = _tokens(T, BLOCK_T)
    o_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_TD = in_T[:, None] & (o_D < D)[None, :]
    b_x = tl.load(p_x + o_T[:, None] * D + o_D[None, :], mask=m_TD)
    for k in range(K):
        b_rows = tl.load(p_inverse + o_T * K + k, mask=in_T, other=0).to(tl.int64)
        tl.store(p_out + b_rows[:, None] * D + o_D[None, :], b_x, mask=m_TD)


@jit_for_any_size
def sum_rows_kernel(
    p_y,
    p_weights,
    p_inverse,
    p_end,
    p_out,
    T,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t] = sum over k of weights[t, k] * y[inverse[t, k]]; no weights are ones. Grid as above.

    Rows from the number at p_end on count as zeros; no p_end, and every row counts.
    """
    o_T, in_T = _tokens(T, BLOCK_T)
    o_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_TD = in_T[:, None] & (o_D < D)[None, :]
    b_sum = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in range(K):
        b_rows = tl.load(p_inverse + o_T * K + k, mask=in_T, other=0).to(tl.int64)
        m_rows = m_TD
        if p_end is not None:
            m_rows = m_TD & (b_rows < tl.load(p_end))[:, None]
        b_y = tl.load(p_y + b_rows[:, None] * D + o_D[None, :], mask=m_rows, other=0.0).to(tl.float32)
        if p_weights is not None:
            b_y *= tl.load(p_weights + o_T * K + k, mask=in_T, other=0.0)[:, None]
        b_sum += b_y
    tl.store(p_out + o_T[:, None] * D + o_D[None, :], b_sum.to(p_out.dtype.element_ty), mask=m_TD)


@jit_for_any_size
def combine_bwd_kernel(
    p_grad,
    p_y,
    p_weights,
    p_inverse,
    p_grad_y,
    p_grad_weights,
    T,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_y[inverse[t, k]] = weights[t, k] * grad[t]; grad_weights[t, k] = <grad[t], y[inverse[t, k]]>.

    Grid: blocks of tokens. A program sees whole rows, so that a dot product is done by one; its gradient row
    comes K times, all but the first from the cache.
    """
    o_T, in_T = _tokens(T, BLOCK_T)
    for k in range(K):
        b_rows = tl.load(p_inverse + o_T * K + k, mask=in_T, other=0).to(tl.int64)
        b_weights = tl.load(p_weights + o_T * K + k, mask=in_T, other=0.0)
        b_products = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            o_D = start + tl.arange(0, BLOCK_D)
            m_TD = in_T[:, None] & (o_D < D)[None, :]
            o_rows = b_rows[:, None] * D + o_D[None, :]
            b_grad = tl.load(p_grad + o_T[:, None] * D + o_D[None, :], mask=m_TD, other=0.0).to(tl.float32)
            b_products += b_grad * tl.load(p_y + o_rows, mask=m_TD, other=0.0).to(tl.float32)
            b_grad_y = b_grad * b_weights[:, None]
            tl.store(p_grad_y + o_rows, b_grad_y.to(p_grad_y.dtype.element_ty), mask=m_TD)
        tl.store(p_grad_weights + o_T * K + k, tl.sum(b_products, axis=1), mask=in_T)


def constants_for(top_k: int, width: int) -> dict[str, int]:
    """The constexprs of all three kernels.

    A tile is one row's 1024 columns, which divide the D of most models, or as many whole rows as fit where D
    is smaller. Not tuned on a GPU yet.
    """
    block_d = min(triton.next_power_of_2(width), TILE)
    return {"K": top_k, "D": width, "BLOCK_T": TILE // block_d, "BLOCK_D": block_d}


def copy_rows(x_TD: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
    """Launch the forward of `permute`; contiguous inputs."""
    T, D = x_TD.shape
    out_ND = x_TD.new_empty(T * top_k, D)
    if out_ND.numel():
        constants = constants_for(top_k, D)
        grid = (triton.cdiv(T, constants["BLOCK_T"]), triton.cdiv(D, constants["BLOCK_D"]))
        with torch.cuda.device_of(x_TD):
            copy_rows_kernel[grid](x_TD, inverse_N, out_ND, T, **constants, num_warps=NUM_WARPS)
    return out_ND


def sum_rows(
    y_ND: Tensor, weights_TK: Tensor | None, inverse_N: Tensor, top_k: int, *, ends_e: Tensor | None = None
) -> Tensor:
    """Launch the forward of `combine`, or without weights of `unpermute`; contiguous inputs.

    Rows of no expert, those from ends[-1] on, count as zeros if ends_e is given.
    """
    N, D = y_ND.shape
    T = N // top_k
    out_TD = y_ND.new_empty(T, D)
    if out_TD.numel():
        constants = constants_for(top_k, D)
        grid = (triton.cdiv(T, constants["BLOCK_T"]), triton.cdiv(D, constants["BLOCK_D"]))
        end = None if ends_e is None else ends_e[-1:]
        tensors = (y_ND, weights_TK, inverse_N, end, out_TD)
        with torch.cuda.device_of(y_ND):
            sum_rows_kernel[grid](*tensors, T, **constants, num_warps=NUM_WARPS)
    return out_TD


def combine_bwd(
    grad_TD: Tensor, y_ND: Tensor, weights_TK: Tensor, inverse_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the backward of `combine`: the gradients of y, in its dtype, and of the weights; contiguous."""
    T, K = weights_TK.shape
    grad_y_ND, grad_weights_TK = torch.empty_like(y_ND), torch.empty_like(weights_TK)
    if grad_y_ND.numel():
        constants = constants_for(K, y_ND.shape[1])
        grid = (triton.cdiv(T, constants["BLOCK_T"]),)
        tensors = (grad_TD, y_ND, weights_TK, inverse_N, grad_y_ND, grad_weights_TK)
        with torch.cuda.device_of(y_ND):
            combine_bwd_kernel[grid](*tensors, T, **constants, num_warps=NUM_WARPS)
    return grad_y_ND, grad_weights_TK
