"""Quantisation in one pass over its input: values and scales leave the same kernel. No atomics.

Shapes: R rows, C columns, B blocks, e experts held here, N and K a weight's sides, P padded rows.
The bits of |x| order as |x| does, infinity above every number and NaN above infinity: maxima are those of
integers, and the largest bits say whether a block is finite.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: PLR0917
# Triton has no types: its kernels take pointers and blocks that exist on the device only.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.quantize import formats

INVERSE_LARGEST = tl.constexpr(formats.INVERSE_LARGEST)
SMALLEST_SCALE = tl.constexpr(formats.SMALLEST_SCALE)
ROW_TILE = tl.constexpr(formats.ROW_TILE)
INFINITY_BITS = tl.constexpr(0x7F800000)

# 32 numbers a thread, 64 where weights are squares: enough loads in flight, and registers for two blocks.
TILE = 4096
COLUMN_TILE = 64  # of a tile of rows: one cache line of bf16
NUM_WARPS, NUM_WARPS_WEIGHTS, NUM_WARPS_COLUMNS = 4, 8, 8

# Sizes change from step to step: one binary serves all of them.
jit_for_any_size = triton.jit(do_not_specialize=["R"])


@triton.jit
def magnitude_bits(x):
    """Bits of |x| for an fp32 x."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scales_of(largest_bits, POWER_OF_TWO: tl.constexpr):
    """Scales of blocks from their largest magnitude_bits, and the factors that quantise."""
    scales = tl.maximum(largest_bits.to(tl.float32, bitcast=True) * INVERSE_LARGEST, SMALLEST_SCALE)
    if POWER_OF_TWO:
        # A power of two has a mantissa of zeros; adding all ones first rounds up.
        bits = (scales.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scales = bits.to(tl.float32, bitcast=True)
        factors = (0x7F000000 - bits).to(tl.float32, bitcast=True)  # one over it: the exponent negated
    else:
        factors = tl.div_rn(1.0, scales)
    finite = largest_bits < INFINITY_BITS
    return tl.where(finite, scales, float("nan")), tl.where(finite, factors, float("nan"))


@triton.jit
def as_stored(scales, p_scales):
    """fp32 scales as the array p_scales holds them: fp32, or the exponent byte of e8m0."""
    if p_scales.dtype.element_ty == tl.uint8:
        scales = (scales.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
    return scales


@triton.jit
def rows_of_tile(p_ends, i_tile, E: tl.constexpr, E_PAD: tl.constexpr):
    """First row of a tile and the end of its expert's rows; both 0 for a tile that no expert needs.

    An expert has as many tiles of ROW_TILE as its rows fill, the last one in part.
    """
    o_e = tl.arange(0, E_PAD)
    b_ends = tl.load(p_ends + o_e, mask=o_e < E, other=0)
    b_starts = tl.load(p_ends + o_e - 1, mask=(o_e > 0) & (o_e < E), other=0)
    b_tiles = (b_ends - b_starts + ROW_TILE - 1) // ROW_TILE
    b_tile_ends = tl.cumsum(b_tiles, axis=0)
    b_into = i_tile - (b_tile_ends - b_tiles)
    is_mine = (b_into >= 0) & (i_tile < b_tile_ends)
    start = tl.sum(tl.where(is_mine, b_starts + b_into * ROW_TILE, 0), axis=0)
    return start, tl.sum(tl.where(is_mine, b_ends, 0), axis=0)


@jit_for_any_size
def quantize_rows_kernel(
    p_x,
    p_values,
    p_scales,
    R,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """One scale for every BLOCK columns of a row. Grid: tiles of rows, tiles of columns."""
    TILE_B: tl.constexpr = TILE_C // BLOCK
    NUM_BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    o_R = tl.program_id(0).to(tl.int64) * TILE_R + tl.arange(0, TILE_R)
    o_C = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    o_B = tl.program_id(1) * TILE_B + tl.arange(0, TILE_B)
    m_RC = (o_R < R)[:, None] & (o_C < C)[None, :]
    o_RC = o_R[:, None] * C + o_C[None, :]
    b_x = tl.load(p_x + o_RC, mask=m_RC, other=0.0).to(tl.float32)
    b_blocks = tl.reshape(b_x, (TILE_R, TILE_B, BLOCK))
    b_scales, b_factors = scales_of(tl.max(magnitude_bits(b_blocks), axis=2), POWER_OF_TWO)
    b_values = tl.reshape(b_blocks * b_factors[:, :, None], (TILE_R, TILE_C))
    tl.store(p_values + o_RC, b_values.to(p_values.dtype.element_ty), mask=m_RC)
    m_RB = (o_R < R)[:, None] & (o_B < NUM_BLOCKS)[None, :]
    o_RB = o_R[:, None] * NUM_BLOCKS + o_B[None, :]
    tl.store(p_scales + o_RB, as_stored(b_scales, p_scales), mask=m_RB)


@triton.jit
def quantize_weights_kernel(
    p_w,
    p_values,
    p_scales,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """One scale for every BLOCK x BLOCK square. Grid: squares along N, along K, experts."""
    i_n, i_k, i_e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_N, o_K = i_n * BLOCK + tl.arange(0, BLOCK), i_k * BLOCK + tl.arange(0, BLOCK)
    m_NK = (o_N < N)[:, None] & (o_K < K)[None, :]
    o_NK = i_e * (N * K) + o_N[:, None].to(tl.int64) * K + o_K[None, :]
    b_w = tl.load(p_w + o_NK, mask=m_NK, other=0.0).to(tl.float32)
    scale, factor = scales_of(tl.max(tl.max(magnitude_bits(b_w), axis=1), axis=0), POWER_OF_TWO)
    b_values = (b_w * factor).to(p_values.dtype.element_ty)
    if TRANSPOSED:
        o_KN = i_e * (N * K) + o_K[:, None].to(tl.int64) * N + o_N[None, :]
        m_KN = (o_K < K)[:, None] & (o_N < N)[None, :]
        tl.store(p_values + o_KN, tl.trans(b_values), mask=m_KN)
    else:
        tl.store(p_values + o_NK, b_values, mask=m_NK)
    tl.store(p_scales + (i_e * tl.num_programs(0) + i_n) * tl.num_programs(1) + i_k, scale)


@triton.jit
def quantize_columns_kernel(
    p_x,
    p_order,
    p_ends,
    p_values,
    p_scales,
    TOP_K: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """One scale for every BLOCK rows of a column; values leave transposed. Grid: tiles of rows, columns."""
    TILE_B: tl.constexpr = ROW_TILE // BLOCK
    i_tile, P = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64) * ROW_TILE
    start, end = rows_of_tile(p_ends, i_tile, E, E_PAD)
    o_R = start.to(tl.int64) + tl.arange(0, ROW_TILE)
    o_C = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    m_C = o_C < C
    b_source = o_R
    if p_order is not None:
        b_source = tl.load(p_order + o_R, mask=o_R < end, other=0) // TOP_K
    m_RC = (o_R < end)[:, None] & m_C[None, :]
    b_x = tl.load(p_x + b_source[:, None] * C + o_C[None, :], mask=m_RC, other=0.0).to(tl.float32)
    b_blocks = tl.reshape(b_x, (TILE_B, BLOCK, TILE_C))
    b_scales, b_factors = scales_of(tl.max(magnitude_bits(b_blocks), axis=1), POWER_OF_TWO)
    b_values = tl.reshape(b_blocks * b_factors[:, None, :], (ROW_TILE, TILE_C))
    o_P = i_tile * ROW_TILE + tl.arange(0, ROW_TILE)
    p_out = p_values + o_C[:, None].to(tl.int64) * P + o_P[None, :]
    tl.store(p_out, tl.trans(b_values.to(p_values.dtype.element_ty)), mask=m_C[:, None])
    o_B = i_tile * TILE_B + tl.arange(0, TILE_B)
    p_out_scales = p_scales + o_C[:, None].to(tl.int64) * (P // BLOCK) + o_B[None, :]
    tl.store(p_out_scales, tl.trans(as_stored(b_scales, p_scales)), mask=m_C[:, None])


def row_constants(width: int, kind: formats.Format) -> dict[str, int | bool]:
    """The constexprs of `quantize_rows_kernel`: tiles of up to 512 columns. Not tuned on a GPU yet."""
    tile_c = max(kind.block, min(triton.next_power_of_2(width), 512))
    constants = {"C": width, "BLOCK": kind.block, "POWER_OF_TWO": kind.power_of_two}
    return constants | {"TILE_R": TILE // tile_c, "TILE_C": tile_c}


def quantize_rows_triton(x_RC: Tensor, kind: formats.Format) -> tuple[Tensor, Tensor]:
    """Launch with a contiguous x; contract of `quantize_rows`."""
    R, C = x_RC.shape
    values_RC = x_RC.new_empty(R, C, dtype=formats.VALUE_DTYPE)
    scales_RB = x_RC.new_empty(R, triton.cdiv(C, kind.block), dtype=kind.scale_dtype)
    if R:
        constants = row_constants(C, kind)
        grid = (triton.cdiv(R, constants["TILE_R"]), triton.cdiv(C, constants["TILE_C"]))
        with torch.cuda.device_of(x_RC):
            quantize_rows_kernel[grid](
                x_RC, values_RC, storage(scales_RB), R, **constants, num_warps=NUM_WARPS
            )
    return values_RC, scales_RB


def quantize_weights_triton(w_eNK: Tensor, transposed: bool, kind: formats.Format) -> tuple[Tensor, Tensor]:
    """Launch with contiguous weights; contract of `quantize_weights`."""
    e, N, K = w_eNK.shape
    blocks = triton.cdiv(N, kind.block), triton.cdiv(K, kind.block)
    values = w_eNK.new_empty(e, *((K, N) if transposed else (N, K)), dtype=formats.VALUE_DTYPE)
    scales_eBB = w_eNK.new_empty(e, *blocks, dtype=torch.float32)
    constants = {"N": N, "K": K, "BLOCK": kind.block, "POWER_OF_TWO": kind.power_of_two}
    constants |= {"TRANSPOSED": transposed, "num_warps": NUM_WARPS_WEIGHTS}
    if e:
        with torch.cuda.device_of(w_eNK):
            quantize_weights_kernel[(*blocks, e)](w_eNK, values, scales_eBB, **constants)
    return values, scales_eBB


def column_constants(width: int, num_experts: int, top_k: int, kind: formats.Format) -> dict[str, int | bool]:
    """The constexprs of `quantize_columns_kernel`. Not tuned on a GPU yet."""
    constants = {"TOP_K": top_k, "C": width, "E": num_experts, "E_PAD": triton.next_power_of_2(num_experts)}
    return constants | {"BLOCK": kind.block, "POWER_OF_TWO": kind.power_of_two, "TILE_C": COLUMN_TILE}


def quantize_columns_triton(
    x_TC: Tensor, ends_e: Tensor, order_R: Tensor | None, top_k: int, kind: formats.Format
) -> tuple[Tensor, Tensor]:
    """Launch with a contiguous x; contract of `quantize_columns`."""
    C, num_experts = x_TC.shape[1], ends_e.shape[0]
    num_rows = x_TC.shape[0] if order_R is None else order_R.shape[0]
    num_tiles = num_rows // formats.ROW_TILE + num_experts
    P = num_tiles * formats.ROW_TILE
    values_CP = x_TC.new_empty(C, P, dtype=formats.VALUE_DTYPE)
    scales_CB = x_TC.new_empty(C, P // kind.block, dtype=kind.scale_dtype)
    tensors = (x_TC, order_R, ends_e, values_CP, storage(scales_CB))
    constants = column_constants(C, num_experts, top_k, kind)
    with torch.cuda.device_of(x_TC):
        quantize_columns_kernel[(num_tiles, triton.cdiv(C, COLUMN_TILE))](
            *tensors, **constants, num_warps=NUM_WARPS_COLUMNS
        )
    return values_CP, scales_CB


def storage(scales: Tensor) -> Tensor:
    """e8m0 as bytes, which Triton has a type for."""
    return scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales
