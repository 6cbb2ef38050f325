"""Stable counting sort of expert ids on the device: no host synchronisation, no atomics, bit-equal reruns.

N routed pairs, E experts. The pairs are cut into P tiles of BLOCK, and S = E + 1 counts the sentinels too:

1. `rank_in_tile_kernel` ranks each pair among the pairs of its tile that have the same expert, and counts how
   many pairs each tile has for each expert.
2. A running sum over counts_SP, row by row, says how many pairs stand before those of a tile and expert.
3. `place_kernel` adds the two: the pair's row in expert order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Compiled for sm_90, a warp of 128 pairs needs about 10 instructions a pair; 64 need as many, and twice the
# counts. Not tuned on a GPU yet.
BLOCK = 512
NUM_WARPS = 4

# Sizes change from step to step: one binary serves all of them.
jit_for_any_size = triton.jit(do_not_specialize=["N", "E"])


@triton.jit
def load_experts(p_ids, o_N, N, E):
    """Expert of each pair: E for a sentinel, E + 1 past the end."""
    b_ids = tl.load(p_ids + o_N, mask=o_N < N, other=0)
    b_experts = tl.where((b_ids >= 0) & (b_ids < E), b_ids, E).to(tl.int32)
    return tl.where(o_N < N, b_experts, E + 1)


@triton.jit
def larger(a, b):
    """For a running maximum."""
    return tl.maximum(a, b)


@jit_for_any_size
def rank_in_tile_kernel(p_ids, p_ranks, p_counts, N, E, BLOCK: tl.constexpr):  # noqa: PLR0917
    """One tile a program. Ranks go to p_ranks [N] int64, counts to the zeroed p_counts [S, P] int32."""
    i_P = tl.program_id(0).to(tl.int64)
    num_tiles = tl.num_programs(0)
    o_tile = tl.arange(0, BLOCK)
    # The place in the tile makes keys distinct and the sort stable.
    b_keys = tl.sort(load_experts(p_ids, i_P * BLOCK + o_tile, N, E) * BLOCK + o_tile)
    b_experts = b_keys // BLOCK
    b_previous = tl.gather(b_experts, tl.maximum(o_tile - 1, 0), axis=0)
    b_next = tl.gather(b_experts, tl.minimum(o_tile + 1, BLOCK - 1), axis=0)
    # Sorted, the pairs of an expert are one run; a rank is the distance from where the run starts.
    b_starts = tl.associative_scan(tl.where(b_experts != b_previous, o_tile, 0), 0, larger)
    b_ranks = o_tile - b_starts
    ends_run = (b_experts != b_next) | (o_tile == BLOCK - 1)
    o_N = i_P * BLOCK + b_keys % BLOCK
    tl.store(p_ranks + o_N, b_ranks.to(tl.int64), mask=o_N < N)
    tl.store(p_counts + b_experts.to(tl.int64) * num_tiles + i_P, b_ranks + 1, mask=ends_run & (o_N < N))


@jit_for_any_size
def place_kernel(p_ids, p_order, p_inverse, p_running, N, E, BLOCK: tl.constexpr):  # noqa: PLR0917
    """One tile a program. p_inverse [N] holds ranks before and rows after; p_running is step 2's [S, P]."""
    i_P = tl.program_id(0).to(tl.int64)
    num_tiles = tl.num_programs(0)
    o_N = i_P * BLOCK + tl.arange(0, BLOCK)
    b_experts = load_experts(p_ids, o_N, N, E)
    # The entry before a tile's own is the sum of all entries before it.
    o_before = b_experts.to(tl.int64) * num_tiles + i_P - 1
    b_before = tl.load(p_running + o_before, mask=(o_N < N) & (o_before >= 0), other=0)
    b_rows = b_before + tl.load(p_inverse + o_N, mask=o_N < N, other=0)
    tl.store(p_inverse + o_N, b_rows, mask=o_N < N)
    tl.store(p_order + b_rows, o_N, mask=o_N < N)


def permute_index_triton(ids_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the three steps; contract of `permute_index`."""
    N, E = ids_N.numel(), num_experts
    num_tiles = max(1, triton.cdiv(N, BLOCK))
    order_N, inverse_N = torch.empty_like(ids_N), torch.empty_like(ids_N)
    counts_SP = torch.zeros(E + 1, num_tiles, dtype=torch.int32, device=ids_N.device)
    sizes = {"N": N, "E": E, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
    with torch.cuda.device_of(ids_N):
        rank_in_tile_kernel[(num_tiles,)](ids_N, inverse_N, counts_SP, **sizes)
        running_SP = counts_SP.flatten().cumsum(0, dtype=torch.int32).view_as(counts_SP)
        place_kernel[(num_tiles,)](ids_N, order_N, inverse_N, running_SP, **sizes)
    return order_N, inverse_N, running_SP[:E, -1].contiguous()


@triton.jit(do_not_specialize=["E", "P"])
def pad_to_tiles_kernel(  # noqa: PLR0917
    p_ends, p_rows, p_padded_ends, E, P, TILE: tl.constexpr, E_PAD: tl.constexpr, TILE_PAD: tl.constexpr
):
    """One padded tile a program, of one expert or of none; each finds its own from all the ends."""
    first = tl.program_id(0).to(tl.int64) * TILE
    o_E = tl.arange(0, E_PAD)
    b_ends = tl.load(p_ends + o_E, mask=o_E < E, other=0)
    b_starts = tl.load(p_ends + o_E - 1, mask=(o_E < E) & (o_E > 0), other=0)
    b_padded = tl.where(o_E < E, (b_ends - b_starts + TILE - 1) // TILE * TILE, 0)
    b_padded_ends = tl.cumsum(b_padded, axis=0)
    b_padded_starts = b_padded_ends - b_padded
    is_mine = (b_padded_starts <= first) & (first < b_padded_ends)
    start = tl.sum(tl.where(is_mine, b_starts + first - b_padded_starts, 0), axis=0)
    end = tl.sum(tl.where(is_mine, b_ends, 0), axis=0)
    o_tile = tl.arange(0, TILE_PAD)
    b_rows = tl.where(start + o_tile < end, start + o_tile, -1)
    tl.store(p_rows + first + o_tile, b_rows, mask=(o_tile < TILE) & (first + o_tile < P))
    tl.store(p_padded_ends + o_E, b_padded_ends, mask=(o_E < E) & (first == 0))


def pad_to_tiles_triton(ends_E: Tensor, num_padded: int, tile: int) -> tuple[Tensor, Tensor]:
    """Launch one program a tile; contract of `pad_to_tiles`."""
    E = ends_E.shape[0]
    rows_P = torch.empty(num_padded, dtype=torch.int64, device=ends_E.device)
    padded_ends_E = torch.empty_like(ends_E)
    grid = (max(1, num_padded // tile),)  # without rows, too, the ends are written
    pads = {"E_PAD": triton.next_power_of_2(E), "TILE_PAD": triton.next_power_of_2(tile)}
    with torch.cuda.device_of(ends_E):
        pad_to_tiles_kernel[grid](ends_E, rows_P, padded_ends_E, E, num_padded, TILE=tile, **pads)
    return rows_P, padded_ends_E
