"""SwiGLU experts in MXFP8, for GPUs whose tensor cores apply the scales (sm_100); as in fp8_kernel.py.

Shapes: T tokens, K top-k, N = T*K rows in expert order, P rows padded so that each expert begins on a tile of
128, D model, F expert hidden (a multiple of 128), G = 2F, e experts.

Blocks are 1 x 32 or 32 x 1, so any 32 columns of a tile of dH can leave it in both directions.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: PLR0917
# Triton has no types: its kernels take pointers and blocks that exist on the device only.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.combine.triton_kernel import sum_rows
from moe.kernels.expert_mlp.saved_h import SavedH
from moe.kernels.expert_mlp.triton_kernel import Index, sum_partials
from moe.kernels.grouped_gemm.mx_kernel import (
    MX_BLOCK,
    MxWeight,
    launch_mx_gemm,
    launch_mx_wgrad,
    mx_row_products,
    mx_weight,
)
from moe.kernels.grouped_gemm.triton_kernel import TileMaps, gathered, halves, tile_rows
from moe.kernels.quantize import quantize_columns, quantize_rows
from moe.kernels.quantize.formats import FORMATS, ROW_TILE, VALUE_DTYPE, Quantized
from moe.kernels.quantize.triton_kernel import as_stored, magnitude_bits, scales_of, storage

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

    With p_h_scales, h is quantised too.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    tiles_F: tl.constexpr = F // HALF
    expert, o_M, m_M = tile_rows(p_ends, p_map, tl.program_id(0) // tiles_F, BLOCK_M)
    if expert < 0:
        return
    first_F = tl.program_id(0) % tiles_F * HALF
    o_N = tl.arange(0, BLOCK_N)
    b_h = mx_row_products(
        p_x,
        p_x_scales,
        p_w + expert * W_STRIDES[0],
        p_w_scales + expert * W_STRIDES[2],
        gathered(p_order, o_M, m_M, TOP_K),
        m_M,
        first_F + o_N // 2 + o_N % 2 * F,
        o_N >= 0,
        W_STRIDES[1],
        W_STRIDES[3],
        D,
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

    Grid as in grad_h_kernel; `num_tiles` is P / 128.
    """
    tiles_F: tl.constexpr = F // HEIGHT
    i_tile = tl.program_id(0) // tiles_F
    expert, o_M, m_M = tile_rows(p_ends, p_map, i_tile, HEIGHT)
    if expert < 0:
        return
    i_F = tl.program_id(0) % tiles_F
    o_F = (i_F * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)
    o_pairs = tl.load(p_order + o_M, mask=m_M, other=0)
    b_grad_a = mx_row_products(
        p_grad,
        p_grad_scales,
        p_w + expert * W_STRIDES[0],
        p_w_scales + expert * W_STRIDES[2],
        o_pairs // TOP_K,
        m_M,
        o_F,
        o_F >= 0,
        W_STRIDES[1],
        W_STRIDES[3],
        D,
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
    x = quantize_rows(x_TD, format=format, backend="triton")
    order = order_N, weights_TK.shape[1]
    h, a = _launch_up(x, mx_weight(w_gate_up_eGD), order, maps, compress_h=compress_h)
    y_ND = launch_mx_gemm(a, mx_weight(w_down_eDF), x_TD.shape[1], maps, out_dtype=x_TD.dtype)
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
    grad = quantize_rows(grad_TD, format=format, backend="triton")
    w_down = mx_weight(w_down_eDF, transposed=True)
    rows, columns, a_columns, partials_NP = _launch_grad_h(grad, w_down, (weights_TK, h), order_N, maps)
    grad_weights_TK = sum_partials(partials_NP, inverse_N, ends_e).view_as(weights_TK)
    grad_columns = quantize_columns(grad_TD, ends_e, order_N, top_k, format=format, backend="triton")
    grad_down_eDF = launch_mx_wgrad(grad_columns, a_columns, ends_e, out_dtype=dtype)
    del grad_columns, a_columns, partials_NP  # before the next large one
    x_columns = quantize_columns(x_TD, ends_e, order_N, top_k, format=format, backend="triton")
    grad_gate_up_eGD = launch_mx_wgrad(columns, x_columns, ends_e, out_dtype=dtype)
    del columns, x_columns
    w_gate_up = mx_weight(w_gate_up_eGD, transposed=True)
    grad_x_ND = launch_mx_gemm(rows, w_gate_up, x_TD.shape[1], maps, out_dtype=dtype)
    grad_x_TD = sum_rows(grad_x_ND, None, inverse_N, top_k, ends_e=ends_e)
    return grad_x_TD, grad_gate_up_eGD, grad_down_eDF, grad_weights_TK


def _launch_up(
    x: Quantized, w_gate_up: MxWeight, order: tuple[Tensor, int], maps: TileMaps, *, compress_h: bool
) -> tuple[SavedH, Quantized]:
    """H, in bf16 or by rows, and A by rows; `order` is order_N and top_k."""
    G, D = w_gate_up.strides[0] // x.values.shape[1], x.values.shape[1]
    order_N, top_k = order
    a = _new_quantized(x.values, maps.num_rows, G // 2)
    if compress_h:
        h = SavedH(*_new_quantized(x.values, maps.num_rows, G))
    else:
        h = SavedH(x.values.new_empty(maps.num_rows, G, dtype=torch.bfloat16), None)
    if maps.num_rows:
        map_P2 = maps.of(UP_TILE["BLOCK_M"])
        grid = (map_P2.shape[0] * (G // UP_TILE["BLOCK_N"]),)
        operands = (x.values, storage(x.scales), w_gate_up.values, w_gate_up.scales)
        outputs = (*_h_operands(h), a.values, storage(a.scales))
        tensors = (*operands, *outputs, order_N, maps.ends_e, map_P2)
        with torch.cuda.device_of(order_N):
            mx_up_kernel[grid](*tensors, top_k, D, G // 2, w_gate_up.strides, **UP_TILE)
    return h, a


def _launch_grad_h(
    grad: Quantized, w_down: MxWeight, saved: tuple[Tensor, SavedH], order_N: Tensor, maps: TileMaps
) -> tuple[Quantized, Quantized, Quantized, Tensor]:
    """Gradient dH by rows and columns, A' by columns, and dS in parts [N, F / 128]; `saved` are s and h."""
    weights_TK, h = saved
    F, D = h.values.shape[1] // 2, grad.values.shape[1]
    num_tiles = maps.num_rows // ROW_TILE + maps.ends_e.numel()
    rows = _new_quantized(h.values, maps.num_rows, 2 * F)
    columns = _new_quantized(h.values, 2 * F, num_tiles * ROW_TILE)
    a_columns = _new_quantized(h.values, F, num_tiles * ROW_TILE)
    partials_NP = weights_TK.new_empty(maps.num_rows, F // ROW_TILE)
    if maps.num_rows:
        map_P2 = maps.of(ROW_TILE)
        grid = (map_P2.shape[0] * partials_NP.shape[1],)
        operands = (grad.values, storage(grad.scales), w_down.values, w_down.scales)
        outputs = (t for out in (rows, columns, a_columns) for t in (out.values, storage(out.scales)))
        tensors = (
            *operands,
            *_h_operands(h),
            weights_TK,
            *outputs,
            partials_NP,
            order_N,
            maps.ends_e,
            map_P2,
        )
        sizes = (num_tiles, weights_TK.shape[1], D, F, w_down.strides)
        with torch.cuda.device_of(order_N):
            mx_grad_h_kernel[grid](*tensors, *sizes, **GRAD_H_TILE)
    return rows, columns, a_columns, partials_NP


def _h_operands(h: SavedH) -> tuple[Tensor, Tensor | None]:
    return h.values, None if h.scales is None else storage(h.scales)


def _new_quantized(like: Tensor, num_rows: int, width: int) -> Quantized:
    """Room for rows in blocks of 1 x 32."""
    kind = FORMATS["mxfp8"]
    values = like.new_empty(num_rows, width, dtype=VALUE_DTYPE)
    return Quantized(values, like.new_empty(num_rows, width // kind.block, dtype=kind.scale_dtype))
