"""Top-k routing in one Triton kernel forward, one backward. Scores stay in registers.

Shapes: T tokens, E experts, K top-k, G groups. A program takes a block of whole rows. Experts are ranked by
int32 keys, because integers have one order on every device and no two zeros; K rounds take the largest key,
the lower id where keys are equal. Both kernels recompute the scores from the logits, bit-equal in every run:
the only atomics add integers.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: PLR0917
# Triton has no types: its kernels take pointers and blocks that exist on the device only.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Keys below that of every number, -inf included.
TAKEN = tl.constexpr(-(2**31))
NEVER = tl.constexpr(-(2**31) + 1)
LAST = tl.constexpr(2**31 - 1)
EPS = tl.constexpr(1e-20)  # as in reference.py

NUM_WARPS = 1  # a program's K rounds need no barrier


@triton.jit
def _to_keys(x):
    """int32 that ranks like the fp32 x: -0 equals 0, and NaN is above all, as in torch.sort."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, LAST, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _from_keys(keys):
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _take_best(keys_TE, ids_E):
    """Each row's id of the largest key, the lower one of equals, and the keys with that one taken."""
    best_T = tl.max(keys_TE, axis=1)
    id_T = tl.min(tl.where(keys_TE == best_T[:, None], ids_E[None, :], LAST), axis=1)
    return tl.where(ids_E[None, :] == id_T[:, None], TAKEN, keys_TE), id_T


@triton.jit
def _close_groups(
    keys_TE,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """NEVER for experts outside the top groups; a group counts for the sum of its two best."""
    keys_TGe = tl.reshape(keys_TE, (BLOCK_T, GROUPS_PAD, SIZE_PAD))
    place_e = tl.arange(0, SIZE_PAD)[None, None, :]
    best_TG = tl.max(keys_TGe, axis=2)
    at_TG = tl.min(tl.where(keys_TGe == best_TG[:, :, None], place_e, LAST), axis=2)
    second_TG = tl.max(tl.where(place_e == at_TG[:, :, None], TAKEN, keys_TGe), axis=2)
    group_G = tl.arange(0, GROUPS_PAD)
    worth_TG = _to_keys(_from_keys(best_TG) + _from_keys(second_TG))
    worth_TG = tl.where(group_G[None, :] < NUM_GROUPS, worth_TG, NEVER)
    for _ in range(TOP_GROUPS):
        worth_TG, _group_T = _take_best(worth_TG, group_G)
    keys_TGe = tl.where((worth_TG == TAKEN)[:, :, None], keys_TGe, NEVER)
    return tl.reshape(keys_TGe, (BLOCK_T, GROUPS_PAD * SIZE_PAD))


@triton.jit
def _softmax_terms(x, valid):
    """Maximum and normaliser of a softmax over each row's valid entries."""
    top_T = tl.max(tl.where(valid, x, float("-inf")), axis=1)
    return top_T, tl.sum(tl.where(valid, tl.exp(x - top_T[:, None]), 0.0), axis=1)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit(do_not_specialize=["T"])
def topk_route_fwd_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    counts_ptr,
    T,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    CHOICE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Each group is padded to SIZE_PAD columns, so that a row can be seen as [groups, experts of one].

    LAST as the id of the padding also keeps the compiler from giving a lane neighbouring columns: a row then
    spans the warp, and its largest key is one instruction (redux).
    """
    row_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_T = row_T < T
    column_E = tl.arange(0, GROUPS_PAD * SIZE_PAD)
    id_E = column_E // SIZE_PAD * (E // NUM_GROUPS) + column_E % SIZE_PAD
    in_E = (column_E % SIZE_PAD < E // NUM_GROUPS) & (id_E < E)
    id_E = tl.where(in_E, id_E, LAST)
    m_TE = in_T[:, None] & in_E[None, :]
    logits_TE = tl.load(logits_ptr + row_T[:, None] * E + id_E[None, :], mask=m_TE, other=0.0).to(tl.float32)
    if CHOICE == "softmax" or WEIGHTING == "softmax_of_all":
        top_T, total_T = _softmax_terms(logits_TE, in_E[None, :])
    if CHOICE == "softmax":
        choice_TE = tl.exp(logits_TE - top_T[:, None]) / total_T[:, None]
    elif CHOICE == "sigmoid":
        choice_TE = _sigmoid(logits_TE)
    else:
        choice_TE = logits_TE
    if bias_ptr is not None:
        choice_TE += tl.load(bias_ptr + id_E, mask=in_E, other=0.0)[None, :]
    keys_TE = tl.where(in_E[None, :], _to_keys(choice_TE), NEVER)
    if NUM_GROUPS > 1:
        keys_TE = _close_groups(keys_TE, NUM_GROUPS, TOP_GROUPS, GROUPS_PAD, SIZE_PAD, BLOCK_T)

    k_K = tl.arange(0, K_PAD)
    ids_TK = tl.zeros((BLOCK_T, K_PAD), tl.int32)
    for k in range(K):
        keys_TE, id_T = _take_best(keys_TE, id_E)
        ids_TK = tl.where(k_K[None, :] == k, id_T[:, None], ids_TK)
    num_E = tl.sum(((keys_TE == TAKEN) & in_T[:, None]).to(tl.int32), axis=0)
    tl.atomic_add(counts_ptr + id_E, num_E.to(tl.int64), mask=in_E & (num_E > 0), sem="relaxed")

    # The chosen logits come again, from the cache: cheaper than a search in registers for each.
    in_K = k_K[None, :] < K
    m_TK = in_T[:, None] & in_K
    chosen_TK = tl.load(logits_ptr + row_T[:, None] * E + ids_TK, mask=m_TK, other=0.0).to(tl.float32)
    if WEIGHTING == "softmax_of_all":
        weights_TK = tl.exp(chosen_TK - top_T[:, None]) / total_T[:, None]
    elif WEIGHTING == "softmax_of_chosen":
        top_T, total_T = _softmax_terms(chosen_TK, in_K)
        weights_TK = tl.exp(chosen_TK - top_T[:, None]) / total_T[:, None]
    else:
        weights_TK = _sigmoid(chosen_TK)
        if WEIGHTING == "sigmoid_share":
            weights_TK /= (tl.sum(tl.where(in_K, weights_TK, 0.0), axis=1) + EPS)[:, None]
    o_TK = row_T[:, None] * K + k_K[None, :]
    tl.store(ids_ptr + o_TK, ids_TK.to(tl.int64), mask=m_TK)
    tl.store(weights_ptr + o_TK, weights_TK * scale, mask=m_TK)


@triton.jit(do_not_specialize=["T"])
def topk_route_bwd_kernel(
    grad_weights_ptr,
    logits_ptr,
    ids_ptr,
    grad_logits_ptr,
    T,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    WEIGHTING: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The equations are those of topk_route_backward_reference."""
    row_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_T = row_T < T
    k_K = tl.arange(0, K_PAD)
    in_K = k_K[None, :] < K
    m_TK = in_T[:, None] & in_K
    o_TK = row_T[:, None] * K + k_K[None, :]
    ids_TK = tl.load(ids_ptr + o_TK, mask=m_TK, other=0).to(tl.int32)
    g_TK = tl.load(grad_weights_ptr + o_TK, mask=m_TK, other=0.0) * scale
    chosen_TK = tl.load(logits_ptr + row_T[:, None] * E + ids_TK, mask=m_TK, other=0.0).to(tl.float32)

    id_E = tl.arange(0, E_PAD)
    in_E = id_E[None, :] < E
    m_TE = in_T[:, None] & in_E
    o_TE = row_T[:, None] * E + id_E[None, :]
    # In the padding of K, g is zero.
    if WEIGHTING == "softmax_of_all":
        logits_TE = tl.load(logits_ptr + o_TE, mask=m_TE, other=0.0).to(tl.float32)
        top_T, total_T = _softmax_terms(logits_TE, in_E)
        probs_TK = tl.exp(chosen_TK - top_T[:, None]) / total_T[:, None]
        dot_T = tl.sum(tl.where(in_K, probs_TK, 0.0) * g_TK, axis=1)
        chosen_grad_TK = g_TK
    elif WEIGHTING == "softmax_of_chosen":
        top_T, total_T = _softmax_terms(chosen_TK, in_K)
        shares_TK = tl.where(in_K, tl.exp(chosen_TK - top_T[:, None]) / total_T[:, None], 0.0)
        chosen_grad_TK = shares_TK * (g_TK - tl.sum(shares_TK * g_TK, axis=1)[:, None])
    else:
        scores_TK = tl.where(in_K, _sigmoid(chosen_TK), 0.0)
        if WEIGHTING == "sigmoid_share":
            total_T = tl.sum(scores_TK, axis=1) + EPS
            dot_T = tl.sum(scores_TK / total_T[:, None] * g_TK, axis=1)
            g_TK = (g_TK - dot_T[:, None]) / total_T[:, None]
        chosen_grad_TK = g_TK * scores_TK * (1 - scores_TK)

    # Registers have no index: K rounds bring one column each to its place.
    grad_TE = tl.zeros((BLOCK_T, E_PAD), tl.float32)
    for k in range(K):
        is_k = k_K[None, :] == k
        id_T = tl.sum(tl.where(is_k, ids_TK, 0), axis=1)
        grad_T = tl.sum(tl.where(is_k, chosen_grad_TK, 0.0), axis=1)
        grad_TE = tl.where(id_E[None, :] == id_T[:, None], grad_T[:, None], grad_TE)
    if WEIGHTING == "softmax_of_all":
        probs_TE = tl.exp(logits_TE - top_T[:, None]) / total_T[:, None]
        grad_TE = probs_TE * (grad_TE - dot_T[:, None])
    tl.store(grad_logits_ptr + o_TE, grad_TE.to(grad_logits_ptr.dtype.element_ty), mask=m_TE)


def block_of_rows(width: int) -> int:
    """Rows of a program, for rows of so many columns, padding included.

    A tile of 1024, 32 keys a thread, keeps enough rows in flight to hide a reduction's latency. Rows wider
    than 128 make a tile of 512: compiled for sm_90 with 256 experts, it takes 40 registers instead of 62 and
    no local memory instead of 8 bytes.
    """
    tile = 1024 if width <= 128 else 512
    return max(1, min(32, tile // width))


def forward_constants(
    num_experts: int, top_k: int, choice: str, weighting: str, num_groups: int, top_groups: int
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
        "BLOCK_T": block_of_rows(groups_pad * size_pad),
    }


def backward_constants(num_experts: int, top_k: int, weighting: str) -> dict[str, Any]:
    """The constexprs of topk_route_bwd_kernel."""
    e_pad = triton.next_power_of_2(num_experts)
    return {
        "E": num_experts,
        "K": top_k,
        "K_PAD": triton.next_power_of_2(top_k),
        "E_PAD": e_pad,
        "WEIGHTING": weighting,
        "BLOCK_T": block_of_rows(e_pad),
    }


def topk_route_fwd(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    *,
    choice: str,
    weighting: str,
    scale: float,
    num_groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward: contiguous logits of fp32, bf16 or fp16; contract of `topk_route_torch`."""
    T, E = logits_TE.shape
    ids_TK = torch.empty(T, top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(T, top_k, dtype=torch.float32, device=logits_TE.device)
    counts_E = torch.zeros(E, dtype=torch.int64, device=logits_TE.device)
    if T == 0:
        return ids_TK, weights_TK, counts_E
    constants = forward_constants(E, top_k, choice, weighting, num_groups, top_groups)
    grid = (triton.cdiv(T, constants["BLOCK_T"]),)
    tensors = (logits_TE, bias_E, ids_TK, weights_TK, counts_E)
    with torch.cuda.device_of(logits_TE):
        topk_route_fwd_kernel[grid](*tensors, T, scale, **constants, num_warps=NUM_WARPS)
    return ids_TK, weights_TK, counts_E


def topk_route_bwd(
    grad_weights_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, *, weighting: str, scale: float
) -> Tensor:
    """Launch the backward: the logits' gradient in their dtype, zeros included. All contiguous."""
    T, E = logits_TE.shape
    grad_TE = torch.empty_like(logits_TE)
    if T == 0:
        return grad_TE
    constants = backward_constants(E, ids_TK.shape[1], weighting)
    grid = (triton.cdiv(T, constants["BLOCK_T"]),)
    tensors = (grad_weights_TK, logits_TE, ids_TK, grad_TE)
    with torch.cuda.device_of(logits_TE):
        topk_route_bwd_kernel[grid](*tensors, T, scale, **constants, num_warps=NUM_WARPS)
    return grad_TE
