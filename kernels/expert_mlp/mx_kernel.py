"""SwiGLU experts in MXFP8, for GPUs whose tensor cores apply the scales (sm_100); as in fp8_kernel.py.

Blocks are 1 x 32 or 32 x 1, so any 32 columns of a tile of dH can leave it in both directions.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: PLR0917
# Triton has no types: its kernels take pointers and blocks that exist on the device only.

from __future__ import annotations

import triton
import triton.language as tl

from moe.kernels.grouped_gemm.fp8_kernel import wide_products
from moe.kernels.grouped_gemm.mx_kernel import MX_BLOCK, mx_row_products
from moe.kernels.grouped_gemm.triton_kernel import gathered, halves, tile_rows
from moe.kernels.quantize.formats import ROW_TILE
from moe.kernels.quantize.triton_kernel import as_stored, magnitude_bits, scales_of

HEIGHT = tl.constexpr(ROW_TILE)
# Not tuned on a GPU yet.
UP_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 4}
GRAD_H_TILE = {"num_warps": 8, "num_stages": 4}


@triton.jit
def mx_up_kernel(
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """h[r] = x[token of r] @ w[expert]^T, and a[r] = silu(gate) * up quantised. Grid as in up_kernel.

    With p_h_scales, h is quantised too; without p_x_scales, x and w are wide.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    tiles_F: tl.constexpr = F // HALF
    expert, o_M, m_M = tile_rows(p_ends, p_map, tl.program_id(0) // tiles_F, BLOCK_M)
    if expert < 0:
        return
    first_F = tl.program_id(0) % tiles_F * HALF
    o_N = tl.arange(0, BLOCK_N)
    b_h = products(
        p_x,
        p_x_scales,
        p_w,
        p_w_scales,
        expert,
        gathered(p_order, o_M, m_M, TOP_K),
        m_M,
        first_F + o_N // 2 + o_N % 2 * F,
        D,
        W_STRIDES,
        BLOCK_M,
        BLOCK_N,
    )
    b_gate, b_up = tl.split(tl.reshape(b_h.to(tl.bfloat16), (BLOCK_M, HALF, 2)))
    # The activation is that of the rounded values, those that the backward will have.
    b_gate = store_rows(p_h, p_h_scales, b_gate, o_M, m_M, first_F, 2 * F, BLOCK_M, HALF)
    b_up = store_rows(p_h, p_h_scales, b_up, o_M, m_M, F + first_F, 2 * F, BLOCK_M, HALF)
    b_a = b_gate / (1 + tl.exp(-b_gate)) * b_up
    store_rows(p_a, p_a_scales, b_a, o_M, m_M, first_F, F, BLOCK_M, HALF)


@triton.jit(do_not_specialize=["num_tiles"])
def mx_grad_h_kernel(
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
):
    """Gradient dH by rows and columns, A' = s * A by columns, and each tile's part of dS [N, F / 128].

    Grid as in grad_h_kernel; `num_tiles` is P / 128. Without p_grad_scales, grad and w are wide.
    """
    tiles_F: tl.constexpr = F // HEIGHT
    i_tile = tl.program_id(0) // tiles_F
    expert, o_M, m_M = tile_rows(p_ends, p_map, i_tile, HEIGHT)
    if expert < 0:
        return
    i_F = tl.program_id(0) % tiles_F
    o_F = (i_F * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)
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
        D,
        W_STRIDES,
        HEIGHT,
        HEIGHT,
    )
    b_weights = tl.load(p_weights + o_pairs, mask=m_M, other=0.0)
    # A quarter at a time: gate, up and what comes of them do not fit in registers beside a whole tile.
    b_left, b_right = halves(b_grad_a, HEIGHT, HEIGHT)
    b_quarters = halves(b_left, HEIGHT, HEIGHT // 2) + halves(b_right, HEIGHT, HEIGHT // 2)
    b_part = tl.zeros((HEIGHT,), tl.float32)
    for i in tl.static_range(4):
        first = i_F * HEIGHT + i * MX_BLOCK
        p_h_MF = p_h + o_M[:, None] * (2 * F) + (first + tl.arange(0, MX_BLOCK))[None, :]
        b_gate = tl.load(p_h_MF, mask=m_M[:, None], other=0.0).to(tl.float32)
        b_up = tl.load(p_h_MF + F, mask=m_M[:, None], other=0.0).to(tl.float32)
        if p_h_scales is not None:
            p_h_scales_M = p_h_scales + o_M * (2 * F // MX_BLOCK) + first // MX_BLOCK
            b_gate *= from_byte(tl.load(p_h_scales_M, mask=m_M, other=1))[:, None]
            b_up *= from_byte(tl.load(p_h_scales_M + F // MX_BLOCK, mask=m_M, other=1))[:, None]
        b_sigmoid = 1 / (1 + tl.exp(-b_gate))
        b_silu = b_gate * b_sigmoid
        b_a = b_silu * b_up
        b_part += tl.sum(b_quarters[i] * b_a, axis=1)
        store_columns(p_a, p_a_scales, b_a * b_weights[:, None], first, i_tile, num_tiles)
        b_scaled = b_quarters[i] * b_weights[:, None]
        b_grad_up = (b_scaled * b_silu).to(tl.bfloat16).to(tl.float32)
        store_rows(p_rows, p_row_scales, b_grad_up, o_M, m_M, F + first, 2 * F, HEIGHT, MX_BLOCK)
        store_columns(p_columns, p_column_scales, b_grad_up, F + first, i_tile, num_tiles)
        b_grad_gate = b_scaled * b_up * (b_sigmoid + b_silu * (1 - b_sigmoid))
        b_grad_gate = b_grad_gate.to(tl.bfloat16).to(tl.float32)
        store_rows(p_rows, p_row_scales, b_grad_gate, o_M, m_M, first, 2 * F, HEIGHT, MX_BLOCK)
        store_columns(p_columns, p_column_scales, b_grad_gate, first, i_tile, num_tiles)
    tl.store(p_partials + o_M * tiles_F + i_F, b_part, mask=m_M)


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
    K: tl.constexpr,
    W_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As in fp8_kernel.py, but strides of quantised weights are those of values and of scales (`Weight`)."""
    m_columns = o_columns >= 0
    p_expert = p_w + expert * W_STRIDES[0]
    if p_a_scales is None:
        b_sum = wide_products(p_a, p_w, expert, o_rows, m_rows, o_columns, W_STRIDES, K, BLOCK_M, BLOCK_N)
    else:
        b_sum = mx_row_products(
            p_a,
            p_a_scales,
            p_expert,
            p_w_scales + expert * W_STRIDES[2],
            o_rows,
            m_rows,
            o_columns,
            m_columns,
            W_STRIDES[1],
            W_STRIDES[3],
            K,
            BLOCK_M,
            BLOCK_N,
        )
    return b_sum


@triton.jit
def store_rows(
    p_values,
    p_scales,
    x,
    o_M,
    m_M,
    first,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store columns [ROWS, COLUMNS] of rows that are WIDTH long, in blocks of 1 x 32 if there are scales.

    Returns what was stored, in fp32.
    """
    BLOCKS: tl.constexpr = COLUMNS // MX_BLOCK
    p_values_MC = p_values + o_M[:, None] * WIDTH + (first + tl.arange(0, COLUMNS))[None, :]
    if p_scales is None:
        b_values = x.to(p_values.dtype.element_ty)
        b_stored = b_values.to(tl.float32)
    else:
        b_blocks = tl.reshape(x.to(tl.float32), (ROWS, BLOCKS, MX_BLOCK))
        b_scales, b_factors = scales_of(tl.max(magnitude_bits(b_blocks), axis=2), True)
        o_B = first // MX_BLOCK + tl.arange(0, BLOCKS)
        p_scales_MB = p_scales + o_M[:, None] * (WIDTH // MX_BLOCK) + o_B[None, :]
        tl.store(p_scales_MB, as_stored(b_scales, p_scales), mask=m_M[:, None])
        b_quantized = (b_blocks * b_factors[:, :, None]).to(p_values.dtype.element_ty)
        b_values = tl.reshape(b_quantized, (ROWS, COLUMNS))
        b_stored = tl.reshape(b_quantized.to(tl.float32) * b_scales[:, :, None], (ROWS, COLUMNS))
    tl.store(p_values_MC, b_values, mask=m_M[:, None])
    return b_stored


@triton.jit
def from_byte(b_scales):
    """The fp32 power of two of an e8m0; the bytes of 2**-127 and NaN do not occur with numbers."""
    return (b_scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_columns(p_values, p_scales, x, first, i_tile, num_tiles):
    """Quantise 32 columns [128, 32] in blocks of 32 x 1, and store them transposed as tile i_tile."""
    BLOCKS: tl.constexpr = HEIGHT // MX_BLOCK
    b_blocks = tl.reshape(x, (BLOCKS, MX_BLOCK, MX_BLOCK))
    b_scales, b_factors = scales_of(tl.max(magnitude_bits(b_blocks), axis=1), True)
    b_values = tl.reshape(b_blocks * b_factors[:, None, :], (HEIGHT, MX_BLOCK)).to(p_values.dtype.element_ty)
    o_tiles = (first + tl.arange(0, MX_BLOCK)).to(tl.int64) * num_tiles + i_tile
    tl.store(p_values + o_tiles[:, None] * HEIGHT + tl.arange(0, HEIGHT)[None, :], tl.trans(b_values))
    p_scales_CB = p_scales + o_tiles[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    tl.store(p_scales_CB, tl.trans(as_stored(b_scales, p_scales)))
