"""Grouped GEMMs whose sizes are known on the device only: each expert multiplies its own rows.

Shapes: R rows in expert order, of which expert i owns ends[i-1] to ends[i]; e experts; P tiles of BLOCK_M
rows. M, N, K are those of a matrix product: out[M, N] = a[M, K] @ b[K, N].

- `grouped_gemm_kernel`, variable M: out = a @ w[expert]. A tile never crosses an expert's border, so the host
  launches the largest number of tiles that R rows and e experts can make, and `tile_map_kernel` says on the
  device which expert and rows a tile has. No size travels to the host.
- `grouped_wgrad_kernel`, variable K: out[expert] = left^T @ right over the expert's rows; zeros if it has
  none.

Rows may be gathered while they are loaded: row r of expert order is row order[r] // TOP_K of the tensor,
which is then never copied into expert order. Sums are in fp32 and each output has one writer: reruns are
bit-equal.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: PLR0917
# Triton has no types: its kernels take pointers and blocks that exist on the device only.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.grouped_gemm.tiles import Sizes, Tile, launch_options, tile_for

# Tiles that one program of tile_map_kernel describes, against all experts at once.
MAP_BLOCK = 16


@triton.jit(do_not_specialize=["num_tiles", "num_experts"])
def tile_map_kernel(
    p_ends, p_map, num_tiles, num_experts, BLOCK_M: tl.constexpr, E_PAD: tl.constexpr, BLOCK_P: tl.constexpr
):
    """p_map [P, 2] int32: the expert of each tile and its first row; expert -1 where no rows are left."""
    o_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_E = tl.arange(0, E_PAD)
    in_E = o_E < num_experts
    b_ends = tl.load(p_ends + o_E, mask=in_E, other=0)
    b_starts = tl.load(p_ends + o_E - 1, mask=in_E & (o_E > 0), other=0)
    b_tiles = tl.where(in_E, (b_ends - b_starts + BLOCK_M - 1) // BLOCK_M, 0)
    b_tile_ends = tl.cumsum(b_tiles, axis=0)
    # An expert whose tiles all come before this one is passed, and so is one without rows.
    b_expert = tl.sum((b_tile_ends[None, :] <= o_P[:, None]).to(tl.int32), axis=1)
    b_tile_starts = b_tile_ends - b_tiles
    b_rows = b_starts[None, :] + (o_P[:, None] - b_tile_starts[None, :]) * BLOCK_M
    b_row = tl.sum(tl.where(o_E[None, :] == b_expert[:, None], b_rows, 0), axis=1)
    b_expert = tl.where(o_P < tl.sum(b_tiles, axis=0), b_expert, -1)
    tl.store(p_map + o_P * 2, b_expert, mask=o_P < num_tiles)
    tl.store(p_map + o_P * 2 + 1, b_row, mask=o_P < num_tiles)


@triton.jit
def tile_rows(p_ends, p_map, i_tile, BLOCK_M: tl.constexpr):
    """Expert of the tile (-1: none), its rows in expert order as int64, and which are the expert's."""
    expert = tl.load(p_map + i_tile * 2).to(tl.int64)
    o_M = tl.load(p_map + i_tile * 2 + 1).to(tl.int64) + tl.arange(0, BLOCK_M)
    return expert, o_M, o_M < tl.load(p_ends + tl.maximum(expert, 0))


@triton.jit
def gathered(p_order, o_R, m_R, TOP_K: tl.constexpr):
    """Rows of a tensor for rows of expert order; the same rows without an order."""
    if p_order is not None:
        o_R = tl.load(p_order + o_R, mask=m_R, other=0) // TOP_K
    return o_R


@triton.jit
def halves(x, M: tl.constexpr, N: tl.constexpr):
    """The left and the right N / 2 columns of [M, N], in registers."""
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


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
def row_products(
    p_a,
    p_w,
    o_rows,
    m_rows,
    o_columns,
    m_columns,
    stride_n: tl.constexpr,
    stride_k: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N]: rows of a [., K] times columns of a weight with these strides."""
    o_K = tl.arange(0, BLOCK_K)
    p_a_MK = p_a + o_rows[:, None] * K + o_K[None, :]
    p_w_KN = p_w + o_K[:, None] * stride_k + o_columns[None, :] * stride_n
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        m_K = (start + o_K < K) | (K % BLOCK_K == 0)
        b_a = tl.load(p_a_MK, mask=m_rows[:, None] & m_K[None, :], other=0.0)
        b_w = tl.load(p_w_KN, mask=m_K[:, None] & m_columns[None, :], other=0.0)
        b_sum = tl.dot(b_a, b_w, b_sum, input_precision="ieee")
        p_a_MK += BLOCK_K
        p_w_KN += BLOCK_K * stride_k
    return b_sum


@triton.jit
def grouped_gemm_kernel(
    p_a,
    p_w,
    p_bias,
    p_out,
    p_order,
    p_ends,
    p_map,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    W_IS_NK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[r] = a[row of r] @ w[expert of r] (+ bias), w [e, K, N], or [e, N, K] transposed.

    Grid: tiles of rows x tiles of columns, columns first: neighbours share rows of a, and their expert's
        weight
    stays in the L2 cache.
    """
    tiles_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    i_tile = tl.program_id(0) // tiles_N
    expert, o_M, m_M = tile_rows(p_ends, p_map, i_tile, BLOCK_M)
    if expert < 0:
        return
    o_N = tl.program_id(0) % tiles_N * BLOCK_N + tl.arange(0, BLOCK_N)
    m_N = o_N < N
    stride_n: tl.constexpr = K if W_IS_NK else 1
    stride_k: tl.constexpr = 1 if W_IS_NK else N
    b_out = row_products(
        p_a,
        p_w + expert * (N * K),
        gathered(p_order, o_M, m_M, TOP_K),
        m_M,
        o_N,
        m_N,
        stride_n,
        stride_k,
        K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if p_bias is not None:
        b_out += tl.load(p_bias + expert * N + o_N, mask=m_N, other=0.0).to(tl.float32)[None, :]
    p_out_MN = p_out + o_M[:, None] * N + o_N[None, :]
    tl.store(p_out_MN, b_out.to(p_out.dtype.element_ty), mask=m_M[:, None] & m_N[None, :])


@triton.jit
def grouped_wgrad_kernel(
    p_left,
    p_right,
    p_out,
    p_order_left,
    p_order_right,
    p_ends,
    TOP_K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[expert] (+)= sum over its rows of left[row]^T right[row]. Grid: experts x tiles of [M, N]."""
    tiles_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    expert = (tl.program_id(0) // (tiles_M * tiles_N)).to(tl.int64)
    i_tile = tl.program_id(0) % (tiles_M * tiles_N)
    o_M = i_tile // tiles_N * BLOCK_M + tl.arange(0, BLOCK_M)
    o_N = i_tile % tiles_N * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(p_ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(p_ends + expert)
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_K):
        o_R = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        m_R = o_R < end
        o_left = gathered(p_order_left, o_R, m_R, TOP_K)
        o_right = gathered(p_order_right, o_R, m_R, TOP_K)
        p_left_MR = p_left + o_left[None, :] * M + o_M[:, None]
        p_right_RN = p_right + o_right[:, None] * N + o_N[None, :]
        b_left = tl.load(p_left_MR, mask=(o_M < M)[:, None] & m_R[None, :], other=0.0)
        b_right = tl.load(p_right_RN, mask=m_R[:, None] & (o_N < N)[None, :], other=0.0)
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision="ieee")
    p_out_MN = p_out + expert * (M * N) + o_M[:, None].to(tl.int64) * N
    if ACCUMULATE:
        # A quarter at a time: the old values of a whole tile do not fit in registers beside the sums.
        b_left, b_right = halves(b_sum, BLOCK_M, BLOCK_N)
        b_0, b_1 = halves(b_left, BLOCK_M, BLOCK_N // 2)
        b_2, b_3 = halves(b_right, BLOCK_M, BLOCK_N // 2)
        first_N = i_tile % tiles_N * BLOCK_N
        _add_columns(p_out_MN, b_0, o_M < M, first_N, N, BLOCK_N // 4)
        _add_columns(p_out_MN, b_1, o_M < M, first_N + BLOCK_N // 4, N, BLOCK_N // 4)
        _add_columns(p_out_MN, b_2, o_M < M, first_N + BLOCK_N // 2, N, BLOCK_N // 4)
        _add_columns(p_out_MN, b_3, o_M < M, first_N + 3 * BLOCK_N // 4, N, BLOCK_N // 4)
    else:
        m_MN = (o_M < M)[:, None] & (o_N < N)[None, :]
        tl.store(p_out_MN + o_N[None, :], b_sum.to(p_out.dtype.element_ty), mask=m_MN)


@triton.jit
def _add_columns(p_out_MN, b_sum, m_M, first_N, N: tl.constexpr, BLOCK_N: tl.constexpr):
    o_N = first_N + tl.arange(0, BLOCK_N)
    m_MN = m_M[:, None] & (o_N < N)[None, :]
    b_sum += tl.load(p_out_MN + o_N[None, :], mask=m_MN, other=0.0).to(tl.float32)
    tl.store(p_out_MN + o_N[None, :], b_sum.to(p_out_MN.dtype.scalar.element_ty), mask=m_MN)


class TileMaps:
    """Expert and first row of each tile, made once for each height of a tile."""

    def __init__(self, ends_e: Tensor, num_rows: int) -> None:
        """Of experts that own at most `num_rows` rows together; ends_e is int32 and contiguous."""
        self.ends_e = ends_e
        self.num_rows = num_rows
        self._maps: dict[int, Tensor] = {}

    def of(self, block_m: int) -> Tensor:
        """[P, 2] int32; P is the most tiles of block_m rows that the rows can make."""
        if block_m not in self._maps:
            self._maps[block_m] = _tile_map(self.ends_e, self.num_rows, block_m)
        return self._maps[block_m]


def _tile_map(ends_e: Tensor, num_rows: int, block_m: int) -> Tensor:
    num_experts = ends_e.numel()
    # Each expert that has rows leaves at most one tile part-filled.
    num_tiles = num_rows // block_m + min(num_experts, num_rows)
    map_P2 = torch.empty(num_tiles, 2, dtype=torch.int32, device=ends_e.device)
    if num_tiles:
        pads = {"BLOCK_M": block_m, "E_PAD": triton.next_power_of_2(num_experts), "BLOCK_P": MAP_BLOCK}
        with torch.cuda.device_of(ends_e):
            tile_map_kernel[(triton.cdiv(num_tiles, MAP_BLOCK),)](
                ends_e, map_P2, num_tiles, num_experts, **pads
            )
    return map_P2


def launch_grouped_gemm(
    a: Tensor,
    w: Tensor,
    maps: TileMaps,
    *,
    w_is_nk: bool,
    bias: Tensor | None = None,
    tile: Tile | None = None,
    order_R: Tensor | None = None,
    top_k: int = 1,
) -> Tensor:
    """Product [R, N] in a's dtype; contiguous inputs. Rows from ends[-1] on are not written.

    Args:
        a: [., K].
        w: [e, N, K] if w_is_nk, else [e, K, N].
        maps: of the experts' rows.
        w_is_nk: as said.
        bias: [e, N], added to the rows of each expert.
        tile: by default the one for these sizes.
        order_R: row r is a[order[r] // top_k]; None takes a's rows as they come.
        top_k: as said.
    """
    experts, N, K = w.shape if w_is_nk else (w.shape[0], w.shape[2], w.shape[1])
    tile = tile or tile_for("gemm", Sizes(maps.num_rows, experts, N, K), a)
    out_RN = a.new_empty(maps.num_rows, N)
    if out_RN.numel():
        map_P2 = maps.of(tile.block_m)
        grid = (map_P2.shape[0] * triton.cdiv(N, tile.block_n),)
        tensors = (a, w, bias, out_RN, order_R, maps.ends_e, map_P2)
        with torch.cuda.device_of(a):
            grouped_gemm_kernel[grid](*tensors, top_k, N, K, w_is_nk, **launch_options(tile))
    return out_RN


def launch_grouped_wgrad(
    left: Tensor,
    right: Tensor,
    maps: TileMaps,
    *,
    tile: Tile | None = None,
    order_left_R: Tensor | None = None,
    order_right_R: Tensor | None = None,
    top_k: int = 1,
    accumulate_into: Tensor | None = None,
) -> Tensor:
    """Product [e, M, N]: for each expert the sum over its rows of left^T right; contiguous inputs.

    Args:
        left: [., M].
        right: [., N].
        maps: of the experts' rows.
        tile: by default the one for these sizes.
        order_left_R: row r of left is left[order[r] // top_k]; None takes its rows as they come.
        order_right_R: likewise.
        top_k: as said.
        accumulate_into: [e, M, N], usually fp32, to add to and return; None makes a new one in left's dtype.
    """
    experts, M, N = maps.ends_e.numel(), left.shape[1], right.shape[1]
    tile = tile or tile_for("wgrad", Sizes(maps.num_rows, experts, N, M), left)
    out = left.new_empty(experts, M, N) if accumulate_into is None else accumulate_into
    if out.numel():
        grid = (experts * triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),)
        tensors = (left, right, out, order_left_R, order_right_R, maps.ends_e)
        options = launch_options(tile) | {"ACCUMULATE": accumulate_into is not None}
        with torch.cuda.device_of(left):
            grouped_wgrad_kernel[grid](*tensors, TOP_K=top_k, M=M, N=N, **options)
    return out
