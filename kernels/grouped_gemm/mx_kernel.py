"""Grouped GEMMs of MXFP8 operands, whose blocks of 32 numbers share a power of two; as in fp8_kernel.py.

A tensor core of sm_100 applies these scales itself, so there is one sum, which stays in it; that of
sm_90 cannot. Blocks lie along the sum: a weight is quantised once for each dimension that is summed over.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: PLR0917
# Triton has no types: its kernels take pointers and blocks that exist on the device only.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.grouped_gemm.fp8_kernel import Weight, tiles_of_expert
from moe.kernels.grouped_gemm.triton_kernel import TileMaps, gathered, tile_rows
from moe.kernels.quantize import quantize_columns, quantize_rows
from moe.kernels.quantize.formats import FORMATS, ROW_TILE, Quantized
from moe.kernels.quantize.triton_kernel import storage

MX_BLOCK = tl.constexpr(FORMATS["mxfp8"].block)
STEP = tl.constexpr(ROW_TILE)  # of a sum
E4M3 = tl.constexpr("e4m3")

# Not tuned on a GPU yet. Wider tiles: triton has computed 256 columns wrong on sm_100 (marin#7484).
TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 4}


@triton.jit
def mx_row_products(
    p_a,
    p_a_scales,
    p_w,
    p_w_scales,
    o_rows,
    m_rows,
    o_columns,
    m_columns,
    w_stride: tl.constexpr,
    w_scale_stride: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N]: rows of a [., K] times rows of a weight [., K], which are columns here."""
    NUM_BLOCKS: tl.constexpr = (K + MX_BLOCK - 1) // MX_BLOCK
    o_K, o_B = tl.arange(0, STEP), tl.arange(0, STEP // MX_BLOCK)
    p_a_MK = p_a + o_rows[:, None] * K + o_K[None, :]
    p_w_KN = p_w + o_K[:, None] + o_columns[None, :] * w_stride
    p_a_scales_MB = p_a_scales + o_rows[:, None] * NUM_BLOCKS + o_B[None, :]
    p_w_scales_NB = p_w_scales + o_columns[:, None] * w_scale_stride + o_B[None, :]
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, STEP):
        m_K = start + o_K < K
        m_B = start // MX_BLOCK + o_B < NUM_BLOCKS
        b_a = tl.load(p_a_MK, mask=m_rows[:, None] & m_K[None, :], other=0.0)
        b_w = tl.load(p_w_KN, mask=m_K[:, None] & m_columns[None, :], other=0.0)
        b_a_scales = tl.load(p_a_scales_MB, mask=m_rows[:, None] & m_B[None, :], other=0)
        b_w_scales = tl.load(p_w_scales_NB, mask=m_columns[:, None] & m_B[None, :], other=0)
        b_sum = tl.dot_scaled(b_a, b_a_scales, E4M3, b_w, b_w_scales, E4M3, b_sum)
        p_a_MK += STEP
        p_w_KN += STEP
        p_a_scales_MB += STEP // MX_BLOCK
        p_w_scales_NB += STEP // MX_BLOCK
    return b_sum


@triton.jit
def mx_gemm_kernel(
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
    """out[r] = a[row of r] @ w[expert of r]^T. Grid as in grouped_gemm_kernel."""
    tiles_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert, o_M, m_M = tile_rows(p_ends, p_map, tl.program_id(0) // tiles_N, BLOCK_M)
    if expert < 0:
        return
    o_N = (tl.program_id(0) % tiles_N * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    b_out = mx_row_products(
        p_a,
        p_a_scales,
        p_w + expert * W_STRIDES[0],
        p_w_scales + expert * W_STRIDES[2],
        gathered(p_order, o_M, m_M, TOP_K),
        m_M,
        o_N,
        o_N < N,
        W_STRIDES[1],
        W_STRIDES[3],
        K,
        BLOCK_M,
        BLOCK_N,
    )
    p_out_MN = p_out + o_M[:, None] * N + o_N[None, :]
    tl.store(p_out_MN, b_out.to(p_out.dtype.element_ty), mask=m_M[:, None] & (o_N < N)[None, :])


@triton.jit(do_not_specialize=["num_tiles"])
def mx_wgrad_kernel(
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[expert] = sum over its rows of left[., row] right[., row]^T. Grid: experts x tiles of [M, N]."""
    tiles_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    BLOCKS: tl.constexpr = STEP // MX_BLOCK
    expert = (tl.program_id(0) // (tiles_M * tiles_N)).to(tl.int64)
    i_tile = tl.program_id(0) % (tiles_M * tiles_N)
    o_M = (i_tile // tiles_N * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_N = (i_tile % tiles_N * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    first, end = tiles_of_expert(p_ends, expert, E, E_PAD)
    o_P = first.to(tl.int64) * STEP + tl.arange(0, STEP)
    o_B = first.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    P = num_tiles.to(tl.int64) * STEP
    p_left_MP = p_left + o_M[:, None] * P + o_P[None, :]
    p_right_PN = p_right + o_P[:, None] + o_N[None, :] * P
    p_left_scales_MB = p_left_scales + o_M[:, None] * (P // MX_BLOCK) + o_B[None, :]
    p_right_scales_NB = p_right_scales + o_N[:, None] * (P // MX_BLOCK) + o_B[None, :]
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(first, end):
        b_left = tl.load(p_left_MP, mask=(o_M < M)[:, None], other=0.0)
        b_right = tl.load(p_right_PN, mask=(o_N < N)[None, :], other=0.0)
        b_left_scales = tl.load(p_left_scales_MB, mask=(o_M < M)[:, None], other=0)
        b_right_scales = tl.load(p_right_scales_NB, mask=(o_N < N)[:, None], other=0)
        b_sum = tl.dot_scaled(b_left, b_left_scales, E4M3, b_right, b_right_scales, E4M3, b_sum)
        p_left_MP += STEP
        p_right_PN += STEP
        p_left_scales_MB += BLOCKS
        p_right_scales_NB += BLOCKS
    p_out_MN = p_out + expert * (M * N) + o_M[:, None] * N + o_N[None, :]
    tl.store(p_out_MN, b_sum.to(p_out.dtype.element_ty), mask=(o_M < M)[:, None] & (o_N < N)[None, :])


def mx_weight(w_eNK: Tensor, *, transposed: bool = False) -> Weight:
    """A weight to sum over K with or, transposed, to sum over N with; contiguous."""
    experts, N, K = w_eNK.shape
    if not transposed:
        values, scales = quantize_rows(w_eNK.view(-1, K), format="mxfp8", backend="triton")
        blocks = scales.shape[1]
        return Weight(values, storage(scales), N, (N * K, K, N * blocks, blocks))
    ends_e = torch.arange(1, experts + 1, dtype=torch.int32, device=w_eNK.device) * N
    values, scales = quantize_columns(w_eNK.view(-1, K), ends_e, format="mxfp8", backend="triton")
    tiles, blocks = triton.cdiv(N, ROW_TILE), ROW_TILE // FORMATS["mxfp8"].block
    strides = (tiles * ROW_TILE, values.shape[1], tiles * blocks, scales.shape[1])
    return Weight(values, storage(scales), K, strides)


def launch_mx_gemm(
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
        a: values [., K] and scales [., K / 32].
        w: of `mx_weight`, with K summed over.
        maps: of the experts' rows.
        out_dtype: of the result.
        order_R: row r is a[order[r] // top_k]; None takes a's rows as they come.
        top_k: as said.
    """
    out_RN = a.values.new_empty(maps.num_rows, w.columns, dtype=out_dtype)
    if out_RN.numel():
        map_P2 = maps.of(TILE["BLOCK_M"])
        grid = (map_P2.shape[0] * triton.cdiv(w.columns, TILE["BLOCK_N"]),)
        operands = (a.values, storage(a.scales), w.values, w.scales)
        tensors = (*operands, out_RN, order_R, maps.ends_e, map_P2)
        sizes = (top_k, w.columns, a.values.shape[1], w.strides)
        with torch.cuda.device_of(out_RN):
            mx_gemm_kernel[grid](*tensors, *sizes, **TILE)
    return out_RN


def launch_mx_wgrad(left: Quantized, right: Quantized, ends_e: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """Product [e, M, N]: for each expert the sum over its rows of left right^T; zeros without rows.

    Args:
        left: values [M, P] and scales [M, P / 32] of `quantize_columns`.
        right: likewise, [N, P].
        ends_e: of the experts' rows.
        out_dtype: of the result.
    """
    experts, (M, P), N = ends_e.numel(), left.values.shape, right.values.shape[0]
    out_eMN = left.values.new_empty(experts, M, N, dtype=out_dtype)
    if out_eMN.numel():
        grid = (experts * triton.cdiv(M, TILE["BLOCK_M"]) * triton.cdiv(N, TILE["BLOCK_N"]),)
        operands = (left.values, storage(left.scales), right.values, storage(right.scales))
        sizes = (P // ROW_TILE, M, N, experts, triton.next_power_of_2(experts))
        with torch.cuda.device_of(out_eMN):
            mx_wgrad_kernel[grid](*operands, out_eMN, ends_e, *sizes, **TILE)
    return out_eMN
