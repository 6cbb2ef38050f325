"""What the biases of experts add to the backward, for models that have them (gpt-oss).

Shapes: R rows in expert order, e experts, N and D columns; P tiles of rows.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: PLR0917
# Triton has no types: its kernels take pointers and blocks that exist on the device only.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.grouped_gemm.triton_kernel import TileMaps, gathered, tile_rows

# A block of rows is read as 32 x 128 numbers: whole cache lines, and few enough registers to hide latency.
BLOCK_ROWS = 32
BLOCK_COLUMNS = 128


@triton.jit
def expert_sums_kernel(
    p_a,
    p_order,
    p_weights,
    p_ends,
    p_out,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[expert] = sum over the expert's rows of weight * a[row]. Grid: experts x blocks of columns."""
    tiles_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert = (tl.program_id(0) // tiles_N).to(tl.int64)
    o_N = tl.program_id(0) % tiles_N * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(p_ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(p_ends + expert)
    b_sums = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_R):
        o_R = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        m_R = o_R < end
        o_rows = gathered(p_order, o_R, m_R, TOP_K)
        m_RN = m_R[:, None] & (o_N < N)[None, :]
        b_a = tl.load(p_a + o_rows[:, None] * N + o_N[None, :], mask=m_RN, other=0.0).to(tl.float32)
        if p_weights is not None:
            o_pairs = tl.load(p_order + o_R, mask=m_R, other=0)
            b_a *= tl.load(p_weights + o_pairs, mask=m_R, other=0.0)[:, None]
        b_sums += b_a
    b_out = tl.sum(b_sums, axis=0)
    tl.store(p_out + expert * N + o_N, b_out.to(p_out.dtype.element_ty), mask=o_N < N)


@triton.jit
def bias_products_kernel(
    p_grad,
    p_bias,
    p_out,
    p_order,
    p_ends,
    p_map,
    STRIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[r * STRIDE] = <grad[token of r], bias[expert of r]>. Grid: tiles of rows."""
    expert, o_R, m_R = tile_rows(p_ends, p_map, tl.program_id(0), BLOCK_R)
    if expert < 0:
        return
    o_rows = gathered(p_order, o_R, m_R, TOP_K)
    b_sums = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_N):
        o_D = start + tl.arange(0, BLOCK_N)
        m_RD = m_R[:, None] & (o_D < D)[None, :]
        b_grad = tl.load(p_grad + o_rows[:, None] * D + o_D[None, :], mask=m_RD, other=0.0).to(tl.float32)
        b_bias = tl.load(p_bias + expert * D + o_D, mask=o_D < D, other=0.0).to(tl.float32)
        b_sums += b_grad * b_bias[None, :]
    tl.store(p_out + o_R * STRIDE, tl.sum(b_sums, axis=1), mask=m_R)


def launch_expert_sums(
    a: Tensor,
    maps: TileMaps,
    *,
    order_R: Tensor | None = None,
    weights: Tensor | None = None,
    top_k: int = 1,
) -> Tensor:
    """Sum of each expert's rows, [e, N] in a's dtype, added in fp32; contiguous inputs.

    Args:
        a: [R, N], or a row for each token with order_R.
        maps: of the experts' rows.
        order_R: row r is a[order[r] // top_k].
        weights: fp32, weights[order[r]] multiplies row r.
        top_k: as said.
    """
    experts, N = maps.ends_e.numel(), a.shape[1]
    out_eN = a.new_empty(experts, N)
    grid = (experts * triton.cdiv(N, BLOCK_COLUMNS),)
    tensors = (a, order_R, weights, maps.ends_e, out_eN)
    with torch.cuda.device_of(a):
        expert_sums_kernel[grid](*tensors, top_k, N, BLOCK_ROWS, BLOCK_COLUMNS)
    return out_eN


def launch_bias_products(
    grad_TD: Tensor, bias_eD: Tensor, maps: TileMaps, *, order_R: Tensor, top_k: int, out_R: Tensor
) -> None:
    """Fill out_R, fp32 of any stride, with <grad of the token, bias of the expert>; others contiguous."""
    if not out_R.numel():
        return
    map_P2 = maps.of(BLOCK_ROWS)
    tensors = (grad_TD, bias_eD, out_R, order_R, maps.ends_e, map_P2)
    with torch.cuda.device_of(grad_TD):
        bias_products_kernel[(map_P2.shape[0],)](
            *tensors, out_R.stride(0), top_k, grad_TD.shape[1], BLOCK_ROWS, BLOCK_COLUMNS
        )
