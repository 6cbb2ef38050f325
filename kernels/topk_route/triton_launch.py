"""Launches of the kernels in triton_kernel.py, and the sizes that they are compiled for.

Shapes: T tokens, E experts, K top-k, B sequences, P partial sums, X = E + 1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from moe.kernels.topk_route.triton_kernel import topk_route_bwd_kernel, topk_route_fwd_kernel

NUM_WARPS = 1  # a program's K rounds need no barrier


def block_of_rows(width: int, *, with_sums: bool) -> int:
    """Rows of a block, for rows of so many columns, padding included.

    A tile of 1024, 32 keys a thread, keeps enough rows in flight to hide a reduction's latency. Rows wider
    than 128 make a tile of 512: compiled for sm_90 with 256 experts, it takes 40 registers instead of 62 and
    no local memory instead of 8 bytes. Sums need more registers for each row: 16 rows of 64 experts took all
    255 of a thread, 8 rows take 128.
    """
    tile = 1024 if width <= 128 else 512
    return max(1, min(8 if with_sums else 32, tile // width))


def rounds_of_blocks(num_rows: int, block_t: int, width: int) -> int:
    """Blocks that a program takes in turn when it sums over its rows: the more, the fewer partial sums.

    4096 programs stay, about as many as an H100 holds at once (32 on each of 132 multiprocessors). Rows wider
    than 512 would leave no registers for a loop.
    """
    return 1 if width > 512 else max(1, num_rows // (block_t * 4096))


def forward_constants(
    num_experts: int,
    top_k: int,
    *,
    choice: str,
    weighting: str,
    num_groups: int,
    top_groups: int,
    sums_of: str | None,
) -> dict[str, Any]:
    """The constexprs of topk_route_fwd_kernel."""
    groups_pad = triton.next_power_of_2(num_groups)
    size_pad = triton.next_power_of_2(num_experts // num_groups)
    return {
        "E": num_experts,
        "K": top_k,
        "K_PAD": triton.next_power_of_2(top_k),
        "NUM_GROUPS": num_groups,
        "TOP_GROUPS": top_groups,
        "GROUPS_PAD": groups_pad,
        "SIZE_PAD": size_pad,
        "CHOICE": choice,
        "WEIGHTING": weighting,
        "SUMS_OF": sums_of,
        "BLOCK_T": block_of_rows(groups_pad * size_pad, with_sums=sums_of is not None),
    }


def backward_constants(num_experts: int, top_k: int, weighting: str, sums_of: str | None) -> dict[str, Any]:
    """The constexprs of topk_route_bwd_kernel."""
    e_pad = triton.next_power_of_2(num_experts)
    return {
        "E": num_experts,
        "K": top_k,
        "K_PAD": triton.next_power_of_2(top_k),
        "E_PAD": e_pad,
        "WEIGHTING": weighting,
        "SUMS_OF": sums_of,
        "BLOCK_T": block_of_rows(e_pad, with_sums=sums_of is not None),
    }


def topk_route_fwd(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, *, scale: float, num_sequences: int, **modes: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward: contiguous logits of fp32, bf16 or fp16; contract of `topk_route_torch`.

    `modes` are choice, weighting, num_groups, top_groups and sums_of.
    """
    (T, E), B = logits_TE.shape, num_sequences
    constants = forward_constants(E, top_k, **modes)
    sums_of, block_t = constants["SUMS_OF"], constants["BLOCK_T"]
    width = constants["GROUPS_PAD"] * constants["SIZE_PAD"]
    num_rounds = rounds_of_blocks(T, block_t, width) if sums_of else 1
    grid = (triton.cdiv(T // B, block_t * num_rounds), B)
    new = logits_TE.new_empty
    ids_TK, weights_TK = new(T, top_k, dtype=torch.int64), new(T, top_k, dtype=torch.float32)
    counts_BE = logits_TE.new_zeros(B, E, dtype=torch.int64)
    partial_BPX = new(B, grid[0], E + 1, dtype=torch.float32) if sums_of else None
    if T > 0:
        tensors = (logits_TE, bias_E, ids_TK, weights_TK, counts_BE, partial_BPX)
        with torch.cuda.device_of(logits_TE):
            topk_route_fwd_kernel[grid](*tensors, T, B, num_rounds, scale, **constants, num_warps=NUM_WARPS)
    sums_BX = new(0, E + 1, dtype=torch.float32) if partial_BPX is None else partial_BPX.sum(dim=1)
    return ids_TK, weights_TK, counts_BE, sums_BX


def topk_route_bwd(
    grad_weights_TK: Tensor,
    grad_sums_BX: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    *,
    weighting: str,
    sums_of: str | None,
    scale: float,
) -> Tensor:
    """Launch the backward: the logits' gradient in their dtype, zeros included. All contiguous."""
    T, E = logits_TE.shape
    B = grad_sums_BX.shape[0] if sums_of else 1
    grad_TE = torch.empty_like(logits_TE)
    if T == 0:
        return grad_TE
    constants = backward_constants(E, ids_TK.shape[1], weighting, sums_of)
    grid = (triton.cdiv(T // B, constants["BLOCK_T"]), B)
    tensors = (grad_weights_TK, grad_sums_BX, logits_TE, ids_TK, grad_TE)
    with torch.cuda.device_of(logits_TE):
        topk_route_bwd_kernel[grid](*tensors, T, B, scale, **constants, num_warps=NUM_WARPS)
    return grad_TE
