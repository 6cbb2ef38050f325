"""SwiGLU experts in FP8, launched by fp8_triton.py: what a kernel makes leaves it as its consumers want it.

Shapes: T tokens, K top-k, N = T*K rows in expert order, P rows padded so that each expert begins on a tile of
128 (`quantize_columns`), D model, F expert hidden (a multiple of 128), G = 2F, e experts.

Rows are quantised in blocks of 1 x 128, columns of 128 x 1, squares of 128 x 128: always along the sum. A
tile of dH is 128 x 128, so that it holds whole blocks in both directions.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"
# ruff: noqa: PLR0915, PLR0917
# Triton has no types: its kernels take pointers and blocks that exist on the device only.

from __future__ import annotations

import triton
import triton.language as tl

from moe.kernels.grouped_gemm.fp8_kernel import BLOCK, scaled_row_products, wide_products
from moe.kernels.grouped_gemm.triton_kernel import eighths, gathered, tile_rows
from moe.kernels.quantize.triton_kernel import magnitude_bits, scales_of

# Not tuned on a GPU yet; the largest that the scaled sums and the epilogues leave registers for.
UP_TILE = {"BLOCK_M": 64, "num_warps": 8, "num_stages": 4}
WIDE_UP_TILE = {"BLOCK_M": 128, "num_warps": 8, "num_stages": 4}  # no scaled sum beside the tensor core's
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
    W_STRIDES: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """h[r] = x[token of r] @ w[expert]^T, and a[r] = silu(gate) * up quantised. Grid as in up_kernel.

    A tile has one block of gate's columns and the same of up's, in turn, so that a thread that has one number
    has the other. With p_h_scales, h is quantised too; without p_x_scales, x and w are wide.
    """
    tiles_F: tl.constexpr = F // BLOCK
    expert, o_M, m_M = tile_rows(p_ends, p_map, tl.program_id(0) // tiles_F, BLOCK_M)
    if expert < 0:
        return
    i_F = tl.program_id(0) % tiles_F
    o_N = tl.arange(0, 2 * BLOCK)
    b_h = products(
        p_x,
        p_x_scales,
        p_w,
        p_w_scales,
        expert,
        gathered(p_order, o_M, m_M, TOP_K),
        m_M,
        i_F * BLOCK + o_N // 2 + o_N % 2 * F,
        2 * F,
        D,
        W_STRIDES,
        BLOCK_M,
        2 * BLOCK,
    )
    b_gate, b_up = tl.split(tl.reshape(b_h.to(tl.bfloat16), (BLOCK_M, BLOCK, 2)))
    # The activation is that of the rounded values, those that the backward will have.
    b_gate = store_rows(p_h, p_h_scales, b_gate, o_M, m_M, i_F, 2 * F, POWER_OF_TWO)
    b_up = store_rows(p_h, p_h_scales, b_up, o_M, m_M, i_F + tiles_F, 2 * F, POWER_OF_TWO)
    b_a = b_gate / (1 + tl.exp(-b_gate)) * b_up
    store_rows(p_a, p_a_scales, b_a, o_M, m_M, i_F, F, POWER_OF_TWO)


@triton.jit
def products(
    p_a,
    p_a_scales,
    p_w,
    p_w_scales,
    expert,
    o_rows,
    m_rows,
    o_columns,
    N: tl.constexpr,
    K: tl.constexpr,
    W_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N]: rows of a [., K] times columns of the expert's weight, which has N.

    Of wide operands, which have no scales, W_STRIDES are those of `wide_weight`.
    """
    m_columns = o_columns >= 0
    if p_a_scales is None:
        b_sum = wide_products(p_a, p_w, expert, o_rows, m_rows, o_columns, W_STRIDES, K, BLOCK_M, BLOCK_N)
    else:
        b_sum = scaled_row_products(
            p_a,
            p_a_scales,
            p_w + expert * (N * K),
            p_w_scales + expert * W_STRIDES[0],
            o_rows,
            m_rows,
            o_columns,
            m_columns,
            W_STRIDES[1],
            W_STRIDES[2],
            K,
            BLOCK_M,
            BLOCK_N,
            ONE_BLOCK=BLOCK_N <= BLOCK,
        )
    return b_sum


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
    W_STRIDES: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """Gradient dH by rows and columns, A' = s * A by columns, and each tile's part of dS [N, F / 128].

    Grid as in grad_h_kernel; `num_tiles` is P / 128. Without p_grad_scales, grad and w are wide.
    """
    tiles_F: tl.constexpr = F // BLOCK
    i_tile = tl.program_id(0) // tiles_F
    expert, o_M, m_M = tile_rows(p_ends, p_map, i_tile, BLOCK)
    if expert < 0:
        return
    i_F = tl.program_id(0) % tiles_F
    o_F = i_F * BLOCK + tl.arange(0, BLOCK)
    o_pairs = tl.load(p_order + o_M, mask=m_M, other=0)
    b_grad_a = products(
        p_grad,
        p_grad_scales,
        p_w,
        p_w_scales,
        expert,
        o_pairs // TOP_K,
        m_M,
        o_F,
        F,
        D,
        W_STRIDES,
        BLOCK,
        BLOCK,
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
