"""SwiGLU experts in FP8: what a kernel makes leaves it quantised, as its consumers want it.

Shapes: T tokens, K top-k, N = T*K rows in expert order, P rows padded so that each expert begins on a tile of
128 (`quantize_columns`), D model, F expert hidden (a multiple of 128), G = 2F, e experts.

The kernels and their order are those of triton_kernel.py, each product one of two FP8 operands:

Forward                               Backward
1. up     x rows, W1 squares          1. dH      dO rows, W2 squares
          -> H in bf16 or rows, A rows           -> dH rows, dH columns, A' columns, dS
2. gemm   A rows, W2 squares          2. wgrad   dO columns, A' columns
                                      3. gemm    dH rows, W1 squares
                                      4. wgrad   dH columns, x columns

Rows are quantised in blocks of 1 x 128, columns of 128 x 1, squares of 128 x 128: always along the sum. A
tile of dH is 128 x 128, so that it holds whole blocks in both directions.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"
# ruff: noqa: PLR0915, PLR0917
# Triton has no types: its kernels take pointers and blocks that exist on the device only.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.combine.triton_kernel import sum_rows
from moe.kernels.expert_mlp.saved_h import SavedH
from moe.kernels.expert_mlp.triton_kernel import Index, sum_partials
from moe.kernels.grouped_gemm.fp8_kernel import (
    BLOCK,
    launch_fp8_gemm,
    launch_fp8_wgrad,
    scaled_row_products,
)
from moe.kernels.grouped_gemm.triton_kernel import TileMaps, gathered, halves, tile_rows
from moe.kernels.quantize import quantize_columns, quantize_rows, quantize_weights
from moe.kernels.quantize.formats import FORMATS, ROW_TILE, VALUE_DTYPE, Quantized
from moe.kernels.quantize.triton_kernel import magnitude_bits, scales_of

# Not tuned on a GPU yet; the largest that the scaled sums and the epilogues leave registers for.
UP_TILE = {"BLOCK_M": 64, "num_warps": 8, "num_stages": 4}
GRAD_H_TILE = {"num_warps": 8, "num_stages": 4}


@triton.jit
def fp8_up_kernel(
    p_x,
    p_x_scales,
    p_w,
    p_w_scales,
    p_h,
    p_h_scales,
    p_a,
    p_a_scales,
    p_order,
    p_ends,
    p_map,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """h[r] = x[token of r] @ w[expert]^T, and a[r] = silu(gate) * up quantised. Grid as in up_kernel.

    A tile has one block of gate's columns and the same of up's, in turn, so that a thread that has one number
    has the other. With p_h_scales, h is quantised too.
    """
    tiles_F: tl.constexpr = F // BLOCK
    blocks_D: tl.constexpr = (D + BLOCK - 1) // BLOCK
    expert, o_M, m_M = tile_rows(p_ends, p_map, tl.program_id(0) // tiles_F, BLOCK_M)
    if expert < 0:
        return
    i_F = tl.program_id(0) % tiles_F
    o_N = tl.arange(0, 2 * BLOCK)
    b_h = scaled_row_products(
        p_x,
        p_x_scales,
        p_w + expert * (2 * F * D),
        p_w_scales + expert * (2 * tiles_F * blocks_D),
        gathered(p_order, o_M, m_M, TOP_K),
        m_M,
        i_F * BLOCK + o_N // 2 + o_N % 2 * F,
        o_N >= 0,
        blocks_D,
        1,
        D,
        BLOCK_M,
        2 * BLOCK,
        ONE_BLOCK=False,
    )
    b_gate, b_up = tl.split(tl.reshape(b_h.to(tl.bfloat16), (BLOCK_M, BLOCK, 2)))
    # The activation is that of the rounded values, those that the backward will have.
    b_gate = store_rows(p_h, p_h_scales, b_gate, o_M, m_M, i_F, 2 * F, POWER_OF_TWO)
    b_up = store_rows(p_h, p_h_scales, b_up, o_M, m_M, i_F + tiles_F, 2 * F, POWER_OF_TWO)
    b_a = b_gate / (1 + tl.exp(-b_gate)) * b_up
    store_rows(p_a, p_a_scales, b_a, o_M, m_M, i_F, F, POWER_OF_TWO)


@triton.jit
def store_rows(p_values, p_scales, x, o_M, m_M, i_block, WIDTH: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Store x as a block of columns of rows that are WIDTH long, quantised if there are scales.

    Returns what was stored, in fp32.
    """
    p_block = p_values + o_M[:, None] * WIDTH + (i_block * BLOCK + tl.arange(0, BLOCK))[None, :]
    if p_scales is None:
        b_values = x.to(p_values.dtype.element_ty)
        b_stored = b_values.to(tl.float32)
    else:
        x = x.to(tl.float32)
        b_scales, b_factors = scales_of(tl.max(magnitude_bits(x), axis=1), POWER_OF_TWO)
        tl.store(p_scales + o_M * (WIDTH // BLOCK) + i_block, b_scales, mask=m_M)
        b_values = (x * b_factors[:, None]).to(p_values.dtype.element_ty)
        b_stored = b_values.to(tl.float32) * b_scales[:, None]
    tl.store(p_block, b_values, mask=m_M[:, None])
    return b_stored


@triton.jit(do_not_specialize=["num_tiles"])
def fp8_grad_h_kernel(
    p_grad,
    p_grad_scales,
    p_w,
    p_w_scales,
    p_h,
    p_h_scales,
    p_weights,
    p_rows,
    p_row_scales,
    p_columns,
    p_column_scales,
    p_a,
    p_a_scales,
    p_partials,
    p_order,
    p_ends,
    p_map,
    num_tiles,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """Gradient dH by rows and columns, A' = s * A by columns, and each tile's part of dS [N, F / 128].

    Grid as in grad_h_kernel; `num_tiles` is P / 128.
    """
    tiles_F: tl.constexpr = F // BLOCK
    blocks_D: tl.constexpr = (D + BLOCK - 1) // BLOCK
    i_tile = tl.program_id(0) // tiles_F
    expert, o_M, m_M = tile_rows(p_ends, p_map, i_tile, BLOCK)
    if expert < 0:
        return
    i_F = tl.program_id(0) % tiles_F
    o_F = i_F * BLOCK + tl.arange(0, BLOCK)
    o_pairs = tl.load(p_order + o_M, mask=m_M, other=0)
    b_grad_a = scaled_row_products(
        p_grad,
        p_grad_scales,
        p_w + expert * (D * F),
        p_w_scales + expert * (blocks_D * tiles_F),
        o_pairs // TOP_K,
        m_M,
        o_F,
        o_F >= 0,
        1,
        tiles_F,
        D,
        BLOCK,
        BLOCK,
        ONE_BLOCK=True,
    )
    b_weights = tl.load(p_weights + o_pairs, mask=m_M, other=0.0)
    # An eighth at a time: gate, up and what comes of them do not fit in registers beside a whole tile. The
    # scales of rows are known after the last: until then dH waits in bf16, gate and up in one register.
    COLUMNS: tl.constexpr = BLOCK // 8
    first_F = i_F * BLOCK
    o_MG = o_M[:, None] * (2 * F) + (first_F + tl.arange(0, COLUMNS))[None, :]
    b_grad_a_8 = eighths(b_grad_a, BLOCK, BLOCK)
    if p_h_scales is not None:
        p_h_scales_M = p_h_scales + o_M * (2 * tiles_F) + i_F
        b_gate_factors = tl.load(p_h_scales_M, mask=m_M, other=0.0)
        b_up_factors = tl.load(p_h_scales_M + tiles_F, mask=m_M, other=0.0)
    waiting = ()
    b_part = tl.zeros((BLOCK,), tl.float32)
    b_largest_gate, b_largest_up = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(8):
        b_gate = tl.load(p_h + o_MG + i * COLUMNS, mask=m_M[:, None], other=0.0).to(tl.float32)
        b_up = tl.load(p_h + o_MG + F + i * COLUMNS, mask=m_M[:, None], other=0.0).to(tl.float32)
        if p_h_scales is not None:
            b_gate, b_up = b_gate * b_gate_factors[:, None], b_up * b_up_factors[:, None]
        b_sigmoid = 1 / (1 + tl.exp(-b_gate))
        b_silu = b_gate * b_sigmoid
        b_a = b_silu * b_up
        b_part += tl.sum(b_grad_a_8[i] * b_a, axis=1)
        b_scaled = b_grad_a_8[i] * b_weights[:, None]
        b_gate_bits = bf16_bits(b_scaled * b_up * (b_sigmoid + b_silu * (1 - b_sigmoid)))
        b_up_bits = bf16_bits(b_scaled * b_silu)
        b_largest_gate = tl.maximum(b_largest_gate, tl.max(b_gate_bits & 0x7FFFFFFF, axis=1))
        b_largest_up = tl.maximum(b_largest_up, tl.max(b_up_bits & 0x7FFFFFFF, axis=1))
        waiting = waiting + (b_gate_bits | ((b_up_bits >> 16) & 0xFFFF),)  # noqa: RUF005
        b_scaled_a = b_a * b_weights[:, None]
        first = first_F + i * COLUMNS
        store_columns(p_a, p_a_scales, b_scaled_a, first, i_tile, num_tiles, COLUMNS, POWER_OF_TWO)
    tl.store(p_partials + o_M * tiles_F + i_F, b_part, mask=m_M)
    b_gate_scales, b_gate_factors = scales_of(b_largest_gate, POWER_OF_TWO)
    b_up_scales, b_up_factors = scales_of(b_largest_up, POWER_OF_TWO)
    p_row_scales_M = p_row_scales + o_M * (2 * tiles_F) + i_F
    tl.store(p_row_scales_M, b_gate_scales, mask=m_M)
    tl.store(p_row_scales_M + tiles_F, b_up_scales, mask=m_M)
    for i in tl.static_range(8):
        b_gate = (waiting[i] & -0x10000).to(tl.float32, bitcast=True)
        b_up = (waiting[i] << 16).to(tl.float32, bitcast=True)
        b_values = (b_gate * b_gate_factors[:, None]).to(p_rows.dtype.element_ty)
        tl.store(p_rows + o_MG + i * COLUMNS, b_values, mask=m_M[:, None])
        b_values = (b_up * b_up_factors[:, None]).to(p_rows.dtype.element_ty)
        tl.store(p_rows + o_MG + F + i * COLUMNS, b_values, mask=m_M[:, None])
        first = first_F + i * COLUMNS
        store_columns(p_columns, p_column_scales, b_gate, first, i_tile, num_tiles, COLUMNS, POWER_OF_TWO)
        first += F
        store_columns(p_columns, p_column_scales, b_up, first, i_tile, num_tiles, COLUMNS, POWER_OF_TWO)


@triton.jit
def eighths(x, M: tl.constexpr, N: tl.constexpr):
    """The eighths of the columns of [M, N], in registers."""
    b_left, b_right = halves(x, M, N)
    b_0, b_1 = halves(b_left, M, N // 2)
    b_2, b_3 = halves(b_right, M, N // 2)
    b_00, b_01 = halves(b_0, M, N // 4)
    b_10, b_11 = halves(b_1, M, N // 4)
    b_20, b_21 = halves(b_2, M, N // 4)
    b_30, b_31 = halves(b_3, M, N // 4)
    return b_00, b_01, b_10, b_11, b_20, b_21, b_30, b_31


@triton.jit
def bf16_bits(x):
    """Bits of x rounded to bf16 as a number of fp32, whose lower half is zero."""
    return x.to(tl.bfloat16).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def store_columns(
    p_values, p_scales, x, first, i_tile, num_tiles, COLUMNS: tl.constexpr, POWER_OF_TWO: tl.constexpr
):
    """Quantise columns [128, COLUMNS] and store them transposed as tile i_tile of the padded rows."""
    b_scales, b_factors = scales_of(tl.max(magnitude_bits(x), axis=0), POWER_OF_TWO)
    o_C = (first + tl.arange(0, COLUMNS)).to(tl.int64) * num_tiles + i_tile
    b_values = tl.trans((x * b_factors[None, :]).to(p_values.dtype.element_ty))
    tl.store(p_values + o_C[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], b_values)
    tl.store(p_scales + o_C, b_scales)


def expert_mlp_fwd(
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    w_down_eDF: Tensor,
    weights_TK: Tensor,
    index: Index,
    *,
    format: str,
    compress_h: bool,
) -> tuple[Tensor, SavedH]:
    """y_TD and h; contiguous inputs in bf16 that `expert_mlp` has checked. Uncompressed, h has no scales."""
    order_N, inverse_N, ends_e = index
    maps = TileMaps(ends_e, order_N.numel())
    w_gate_up = quantize_weights(w_gate_up_eGD, format=format, backend="triton")
    x = quantize_rows(x_TD, format=format, backend="triton")
    h, a = _launch_up(x, w_gate_up, (order_N, weights_TK.shape[1]), maps, format, compress_h)
    w_down = quantize_weights(w_down_eDF, format=format, backend="triton")
    y_ND = launch_fp8_gemm(a, w_down, maps, out_dtype=x_TD.dtype)
    return sum_rows(y_ND, weights_TK, inverse_N, weights_TK.shape[1], ends_e=ends_e), h


def expert_mlp_bwd(
    grad_TD: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    index: Index,
    h: SavedH,
    *,
    format: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the forward's first four arguments, `inputs`; all contiguous."""
    x_TD, w_gate_up_eGD, w_down_eDF, weights_TK = inputs
    order_N, inverse_N, ends_e = index
    dtype, top_k = x_TD.dtype, weights_TK.shape[1]
    maps = TileMaps(ends_e, order_N.numel())
    w_down = quantize_weights(w_down_eDF, transposed=True, format=format, backend="triton")
    grad = quantize_rows(grad_TD, format=format, backend="triton")
    rows, columns, a_columns, partials_NP = _launch_grad_h(
        grad, w_down, (weights_TK, h), order_N, maps, format
    )
    grad_weights_TK = sum_partials(partials_NP, inverse_N, ends_e).view_as(weights_TK)
    grad_columns = quantize_columns(grad_TD, ends_e, order_N, top_k, format=format, backend="triton")
    grad_down_eDF = launch_fp8_wgrad(grad_columns, a_columns, ends_e, out_dtype=dtype)
    del grad_columns, a_columns, partials_NP  # before the next large one
    x_columns = quantize_columns(x_TD, ends_e, order_N, top_k, format=format, backend="triton")
    grad_gate_up_eGD = launch_fp8_wgrad(columns, x_columns, ends_e, out_dtype=dtype)
    del columns, x_columns
    w_gate_up = quantize_weights(w_gate_up_eGD, transposed=True, format=format, backend="triton")
    grad_x_ND = launch_fp8_gemm(rows, w_gate_up, maps, out_dtype=dtype, scales_are_kn=True)
    grad_x_TD = sum_rows(grad_x_ND, None, inverse_N, top_k, ends_e=ends_e)
    return grad_x_TD, grad_gate_up_eGD, grad_down_eDF, grad_weights_TK


def _launch_up(
    x: Quantized,
    w_gate_up: Quantized,
    order: tuple[Tensor, int],
    maps: TileMaps,
    format: str,
    compress_h: bool,
) -> tuple[SavedH, Quantized]:
    """H, in bf16 or by rows, and A by rows; `order` is order_N and top_k."""
    _, G, D = w_gate_up.values.shape
    F, num_rows = G // 2, maps.num_rows
    a = _new_quantized(x.values, num_rows, F)
    if compress_h:
        h = SavedH(*_new_quantized(x.values, num_rows, G))
    else:
        h = SavedH(x.scales.new_empty(num_rows, G, dtype=torch.bfloat16), None)
    if num_rows:
        map_P2 = maps.of(UP_TILE["BLOCK_M"])
        grid = (map_P2.shape[0] * (F // ROW_TILE),)
        order_N, top_k = order
        tensors = (*x, *w_gate_up, *h, *a, order_N, maps.ends_e, map_P2)
        with torch.cuda.device_of(order_N):
            fp8_up_kernel[grid](*tensors, top_k, D, F, FORMATS[format].power_of_two, **UP_TILE)
    return h, a


def _launch_grad_h(
    grad: Quantized,
    w_down: Quantized,
    saved: tuple[Tensor, SavedH],
    order_N: Tensor,
    maps: TileMaps,
    format: str,
) -> tuple[Quantized, Quantized, Quantized, Tensor]:
    """Gradient dH by rows and columns, A' by columns, and dS in parts [N, F / 128]; `saved` are s and h."""
    weights_TK, h = saved
    experts, F, D = w_down.values.shape
    num_tiles = maps.num_rows // ROW_TILE + experts
    rows = _new_quantized(h.values, maps.num_rows, 2 * F)
    columns = _new_quantized(h.values, 2 * F, num_tiles * ROW_TILE)
    a_columns = _new_quantized(h.values, F, num_tiles * ROW_TILE)
    partials_NP = weights_TK.new_empty(maps.num_rows, F // ROW_TILE)
    if maps.num_rows:
        map_P2 = maps.of(ROW_TILE)
        grid = (map_P2.shape[0] * partials_NP.shape[1],)
        tensors = (*grad, *w_down, *h, weights_TK, *rows, *columns, *a_columns, partials_NP, order_N)
        sizes = (num_tiles, weights_TK.shape[1], D, F, FORMATS[format].power_of_two)
        with torch.cuda.device_of(order_N):
            fp8_grad_h_kernel[grid](*tensors, maps.ends_e, map_P2, *sizes, **GRAD_H_TILE)
    return rows, columns, a_columns, partials_NP


def _new_quantized(like: Tensor, num_rows: int, width: int) -> Quantized:
    """Room for rows in blocks of 1 x 128."""
    values = like.new_empty(num_rows, width, dtype=VALUE_DTYPE)
    return Quantized(values, like.new_empty(num_rows, width // ROW_TILE, dtype=torch.float32))
