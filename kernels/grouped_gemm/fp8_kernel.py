"""Grouped GEMMs of FP8 operands, whose blocks of 128 numbers share a scale; shapes as in triton_kernel.py.

- `fp8_gemm_kernel`, variable M: out = a @ w[expert]^T, rows of a in blocks of 1 x 128, weights of 128 x 128.
- `fp8_wgrad_kernel`, variable K: out[expert] = left @ right^T over the expert's rows, both from
  `quantize_columns`: transposed, in blocks of 1 x 128, each expert's rows padded with zeros to tiles of 128.

A tensor core of sm_90 adds products of FP8 in about 14 bits (DeepSeek-V3, arXiv 2412.19437 section 3.3.2), so
each 128 products are summed from zero, scaled, and added to an fp32 sum in registers. Both operands are
contiguous along the sum, as sm_90 wants FP8.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: PLR0917
# Triton has no types: its kernels take pointers and blocks that exist on the device only.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.grouped_gemm.triton_kernel import TileMaps, gathered, row_products, tile_rows
from moe.kernels.quantize import formats, quantize_weights
from moe.kernels.quantize.formats import Quantized

BLOCK = tl.constexpr(formats.FORMATS["fp8"].block)


class Weight(NamedTuple):
    """A weight [e, N, K] of a product that sums over K, in blocks or wide, and where its parts are.

    Attributes:
        values: of all experts.
        scales: as a kernel loads them; None is wide.
        columns: of the product, N.
        strides: where a kernel finds the parts. In fp8 those of scales, from expert to expert, from block to
            block of n, and of k. In mxfp8 those of values from expert to expert and from n to n, then the
            same of scales. Wide, those of values: from expert to expert, n to n, k to k.
    """

    values: Tensor
    scales: Tensor | None
    columns: int
    strides: tuple[int, ...]


@triton.jit
def wide_products(
    p_a,
    p_w,
    expert,
    o_rows,
    m_rows,
    o_columns,
    W_STRIDES: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N]: rows of a [., K] times the expert's columns of a `wide_weight`."""
    p_expert = p_w + expert * W_STRIDES[0]
    m_columns = o_columns >= 0
    return row_products(
        p_a,
        p_expert,
        o_rows,
        m_rows,
        o_columns,
        m_columns,
        W_STRIDES[1],
        W_STRIDES[2],
        K,
        BLOCK_M,
        BLOCK_N,
        64,
    )


@triton.jit
def scaled_row_products(
    p_a,
    p_a_scales,
    p_w,
    p_w_scales,
    o_rows,
    m_rows,
    o_columns,
    m_columns,
    block_stride_n: tl.constexpr,
    block_stride_k: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N]: rows of a [., K] times rows of a weight [., K], which are columns here.

    ONE_BLOCK says that the columns lie in one block: one multiplication less for each scaled product.
    """
    NUM_BLOCKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    o_K = tl.arange(0, BLOCK)
    p_a_MK = p_a + o_rows[:, None] * K + o_K[None, :]
    p_w_KN = p_w + o_K[:, None] + o_columns[None, :] * K
    p_a_scales_M = p_a_scales + o_rows * NUM_BLOCKS
    if ONE_BLOCK:
        p_w_scales_N = p_w_scales + tl.min(o_columns // BLOCK, axis=0) * block_stride_n
    else:
        p_w_scales_N = p_w_scales + o_columns // BLOCK * block_stride_n
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_K in range(NUM_BLOCKS):
        m_K = i_K * BLOCK + o_K < K
        b_a = tl.load(p_a_MK, mask=m_rows[:, None] & m_K[None, :], other=0.0)
        b_w = tl.load(p_w_KN, mask=m_K[:, None] & m_columns[None, :], other=0.0)
        b_scales_M = tl.load(p_a_scales_M, mask=m_rows, other=0.0)
        if ONE_BLOCK:
            b_sum += tl.dot(b_a, b_w) * (b_scales_M * tl.load(p_w_scales_N))[:, None]
        else:
            b_scales_N = tl.load(p_w_scales_N, mask=m_columns, other=0.0)
            b_sum += tl.dot(b_a, b_w) * (b_scales_M[:, None] * b_scales_N[None, :])
        p_a_MK += BLOCK
        p_w_KN += BLOCK
        p_a_scales_M += 1
        p_w_scales_N += block_stride_k
    return b_sum


@triton.jit
def fp8_gemm_kernel(
    p_a,
    p_a_scales,
    p_w,
    p_w_scales,
    p_out,
    p_order,
    p_ends,
    p_map,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    W_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[r] = a[row of r] @ w[expert of r]^T, w [e, N, K]. Grid as in grouped_gemm_kernel."""
    tiles_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert, o_M, m_M = tile_rows(p_ends, p_map, tl.program_id(0) // tiles_N, BLOCK_M)
    if expert < 0:
        return
    o_N = tl.program_id(0) % tiles_N * BLOCK_N + tl.arange(0, BLOCK_N)
    m_N = o_N < N
    b_out = scaled_row_products(
        p_a,
        p_a_scales,
        p_w + expert * (N * K),
        p_w_scales + expert * W_STRIDES[0],
        gathered(p_order, o_M, m_M, TOP_K),
        m_M,
        o_N,
        m_N,
        W_STRIDES[1],
        W_STRIDES[2],
        K,
        BLOCK_M,
        BLOCK_N,
        ONE_BLOCK=BLOCK_N <= BLOCK,
    )
    p_out_MN = p_out + o_M[:, None] * N + o_N[None, :]
    tl.store(p_out_MN, b_out.to(p_out.dtype.element_ty), mask=m_M[:, None] & m_N[None, :])


@triton.jit
def tiles_of_expert(p_ends, expert, E: tl.constexpr, E_PAD: tl.constexpr):
    """First of the expert's tiles of BLOCK rows, and the one after its last."""
    o_e = tl.arange(0, E_PAD)
    b_ends = tl.load(p_ends + o_e, mask=o_e < E, other=0)
    b_starts = tl.load(p_ends + o_e - 1, mask=(o_e > 0) & (o_e < E), other=0)
    b_tiles = (b_ends - b_starts + BLOCK - 1) // BLOCK
    first = tl.sum(tl.where(o_e < expert, b_tiles, 0), axis=0)
    return first, tl.sum(tl.where(o_e <= expert, b_tiles, 0), axis=0)


@triton.jit(do_not_specialize=["num_tiles"])
def fp8_wgrad_kernel(
    p_left,
    p_left_scales,
    p_right,
    p_right_scales,
    p_out,
    p_ends,
    num_tiles,
    M: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_MN: tl.constexpr,
):
    """out[expert] = sum over its rows of left[., row] right[., row]^T. Grid: experts x tiles of [M, N]."""
    tiles_N: tl.constexpr = (N + BLOCK_MN - 1) // BLOCK_MN
    tiles_M: tl.constexpr = (M + BLOCK_MN - 1) // BLOCK_MN
    expert = (tl.program_id(0) // (tiles_M * tiles_N)).to(tl.int64)
    i_tile = tl.program_id(0) % (tiles_M * tiles_N)
    first_M, first_N = i_tile // tiles_N * BLOCK_MN, i_tile % tiles_N * BLOCK_MN
    o_M, o_N = first_M + tl.arange(0, BLOCK_MN), first_N + tl.arange(0, BLOCK_MN)
    first, end = tiles_of_expert(p_ends, expert, E, E_PAD)
    o_P = first.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    P = num_tiles.to(tl.int64) * BLOCK
    p_left_MP = p_left + o_M[:, None] * P + o_P[None, :]
    p_right_PN = p_right + o_P[:, None] + o_N[None, :] * P
    # One load for the scales of both sides: as many numbers as threads, or each thread would load all that it
    # needs by itself.
    o_side, o_S = tl.arange(0, 2)[:, None], tl.arange(0, BLOCK_MN)[None, :]
    p_scales_2S = (
        tl.where(
            o_side == 0,
            p_left_scales + (first_M + o_S).to(tl.int64) * num_tiles,
            p_right_scales + (first_N + o_S).to(tl.int64) * num_tiles,
        )
        + first
    )
    m_scales_2S = tl.where(o_side == 0, first_M + o_S < M, first_N + o_S < N)
    b_sum = tl.zeros((BLOCK_MN, BLOCK_MN), tl.float32)
    for _ in range(first, end):
        b_left = tl.load(p_left_MP, mask=(o_M < M)[:, None], other=0.0)
        b_right = tl.load(p_right_PN, mask=(o_N < N)[None, :], other=0.0)
        b_scales_M, b_scales_N = tl.split(tl.trans(tl.load(p_scales_2S, mask=m_scales_2S, other=0.0)))
        b_sum += tl.dot(b_left, b_right) * (b_scales_M[:, None] * b_scales_N[None, :])
        p_left_MP += BLOCK
        p_right_PN += BLOCK
        p_scales_2S += 1
    p_out_MN = p_out + expert * (M * N) + o_M[:, None].to(tl.int64) * N + o_N[None, :]
    tl.store(p_out_MN, b_sum.to(p_out.dtype.element_ty), mask=(o_M < M)[:, None] & (o_N < N)[None, :])


def gemm_tile(rows_per_expert: int, columns: int) -> dict[str, int]:
    """Tile of `fp8_gemm_kernel` and how it is compiled; a step of its sum is a block. Not tuned on a GPU yet.

    The scaled sum lies in registers beside the one that a tensor core makes: no tile exceeds 128 x 128.
    """
    block_m = 64 if rows_per_expert < 128 else 128
    block_n = 64 if columns <= 64 else 128
    num_warps = 8 if block_m * block_n == 128 * 128 else 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": 4}


def wgrad_tile(rows: int, columns: int) -> dict[str, int]:
    """Tile of `fp8_wgrad_kernel`, likewise."""
    block = 64 if max(rows, columns) <= 64 else 128
    return {"BLOCK_MN": block, "num_warps": 8 if block == 128 else 4, "num_stages": 4}


def fp8_weight(w_eNK: Tensor, *, transposed: bool = False, format: str = "fp8") -> Weight:
    """A weight to sum over K with or, transposed, to sum over N with; contiguous. Its squares serve both."""
    values, scales = quantize_weights(w_eNK, transposed=transposed, format=format, backend="triton")
    _, blocks_N, blocks_K = scales.shape
    by_block = (1, blocks_K) if transposed else (blocks_K, 1)
    return Weight(values, scales, values.shape[1], (blocks_N * blocks_K, *by_block))


def wide_weight(w_eNK: Tensor, *, transposed: bool = False) -> Weight:
    """A weight as it is, to sum over K with or, transposed, over N; contiguous."""
    w = w_eNK.transpose(1, 2) if transposed else w_eNK
    return Weight(w, None, w.shape[1], w.stride())


def launch_fp8_gemm(
    a: Quantized,
    w: Weight,
    maps: TileMaps,
    *,
    out_dtype: torch.dtype,
    order_R: Tensor | None = None,
    top_k: int = 1,
) -> Tensor:
    """Product [R, N]; contiguous inputs. Rows from ends[-1] on are not written.

    Args:
        a: values [., K] and scales [., K / 128].
        w: of `fp8_weight`, with K summed over.
        maps: of the experts' rows.
        out_dtype: of the result.
        order_R: row r is a[order[r] // top_k]; None takes a's rows as they come.
        top_k: as said.
    """
    N, K = w.columns, a.values.shape[1]
    out_RN = a.values.new_empty(maps.num_rows, N, dtype=out_dtype)
    if out_RN.numel():
        tile = gemm_tile(maps.num_rows // maps.ends_e.numel(), N)
        map_P2 = maps.of(tile["BLOCK_M"])
        grid = (map_P2.shape[0] * triton.cdiv(N, tile["BLOCK_N"]),)
        tensors = (*a, w.values, w.scales, out_RN, order_R, maps.ends_e, map_P2)
        with torch.cuda.device_of(out_RN):
            fp8_gemm_kernel[grid](*tensors, top_k, N, K, w.strides, **tile)
    return out_RN


def launch_fp8_wgrad(left: Quantized, right: Quantized, ends_e: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """Product [e, M, N]: for each expert the sum over its rows of left right^T; zeros without rows.

    Args:
        left: values [M, P] and scales [M, P / 128] of `quantize_columns`.
        right: likewise, [N, P].
        ends_e: of the experts' rows.
        out_dtype: of the result.
    """
    experts, (M, P), N = ends_e.numel(), left.values.shape, right.values.shape[0]
    out_eMN = left.scales.new_empty(experts, M, N, dtype=out_dtype)
    if out_eMN.numel():
        tile = wgrad_tile(M, N)
        grid = (experts * triton.cdiv(M, tile["BLOCK_MN"]) * triton.cdiv(N, tile["BLOCK_MN"]),)
        tensors = (*left, *right, out_eMN, ends_e, P // formats.ROW_TILE)
        with torch.cuda.device_of(out_eMN):
            fp8_wgrad_kernel[grid](*tensors, M, N, experts, triton.next_power_of_2(experts), **tile)
    return out_eMN
