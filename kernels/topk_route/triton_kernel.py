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

import triton
import triton.language as tl

# Keys below that of every number, -inf included.
TAKEN = tl.constexpr(-(2**31))
NEVER = tl.constexpr(-(2**31) + 1)
LAST = tl.constexpr(2**31 - 1)
EPS = tl.constexpr(1e-20)  # as in reference.py


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


@triton.jit
def _scores_to_rank(logits_TE, top_T, total_T, CHOICE: tl.constexpr):
    if CHOICE == "softmax":
        return tl.exp(logits_TE - top_T[:, None]) / total_T[:, None]
    elif CHOICE == "sigmoid":
        return _sigmoid(logits_TE)
    else:
        return logits_TE


@triton.jit
def _weights(chosen_TK, valid, top_T, total_T, WEIGHTING: tl.constexpr):
    """Before scaling. The softmax terms are those of the whole row."""
    if WEIGHTING == "softmax_of_all":
        return tl.exp(chosen_TK - top_T[:, None]) / total_T[:, None]
    elif WEIGHTING == "softmax_of_chosen":
        top_T, total_T = _softmax_terms(chosen_TK, valid)
        return tl.exp(chosen_TK - top_T[:, None]) / total_T[:, None]
    elif WEIGHTING == "sigmoid_share":
        scores_TK = _sigmoid(chosen_TK)
        return scores_TK / (tl.sum(tl.where(valid, scores_TK, 0.0), axis=1) + EPS)[:, None]
    else:
        return _sigmoid(chosen_TK)


@triton.jit
def _shares(logits_TE, valid, top_T, total_T, SUMS_OF: tl.constexpr):
    """Each valid entry's share of its row's scores, and these. The softmax terms are those of the row."""
    if SUMS_OF == "softmax":
        shares_TE = tl.where(valid, tl.exp(logits_TE - top_T[:, None]) * (1 / total_T)[:, None], 0.0)
        return shares_TE, shares_TE
    else:
        scores_TE = tl.where(valid, _sigmoid(logits_TE), 0.0)
        return scores_TE * (1 / (tl.sum(scores_TE, axis=1) + EPS))[:, None], scores_TE


@triton.jit(do_not_specialize=["T", "num_sequences"])
def topk_route_fwd_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    counts_ptr,
    sums_ptr,
    T,
    num_sequences,
    num_rounds,
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
    SUMS_OF: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A program takes num_rounds blocks of rows; with SUMS_OF, rows of one sequence, program_id(1).

    Each group is padded to SIZE_PAD columns, so that a row can be seen as [groups, experts of one].

    LAST as the id of the padding also keeps the compiler from giving a lane neighbouring columns: a row then
    spans the warp, and its largest key is one instruction (redux).
    """
    column_E = tl.arange(0, GROUPS_PAD * SIZE_PAD)
    id_E = column_E // SIZE_PAD * (E // NUM_GROUPS) + column_E % SIZE_PAD
    in_E = (column_E % SIZE_PAD < E // NUM_GROUPS) & (id_E < E)
    id_E = tl.where(in_E, id_E, LAST)
    k_K = tl.arange(0, K_PAD)
    in_K = k_K[None, :] < K
    if SUMS_OF is not None:
        counts_ptr += tl.program_id(1).to(tl.int64) * E
    shares_E = tl.zeros((GROUPS_PAD * SIZE_PAD,), tl.float32)
    z_T = tl.zeros((BLOCK_T,), tl.float32)
    for i in range(num_rounds):
        row_T = (tl.program_id(0).to(tl.int64) * num_rounds + i) * BLOCK_T + tl.arange(0, BLOCK_T)
        if SUMS_OF is not None:
            row_T = row_T * num_sequences + tl.program_id(1)
        in_T = row_T < T
        m_TE = in_T[:, None] & in_E[None, :]
        o_TE = row_T[:, None] * E + id_E[None, :]
        logits_TE = tl.load(logits_ptr + o_TE, mask=m_TE, other=0.0).to(tl.float32)
        top_T, total_T = _softmax_terms(logits_TE, in_E[None, :])  # compiled where used only
        if SUMS_OF is not None:
            lse_T = top_T + tl.log(total_T)
            z_T += tl.where(in_T, lse_T * lse_T, 0.0)
            shares_E += tl.sum(_shares(logits_TE, m_TE, top_T, total_T, SUMS_OF)[0], axis=0)
        choice_TE = _scores_to_rank(logits_TE, top_T, total_T, CHOICE)
        if bias_ptr is not None:
            choice_TE += tl.load(bias_ptr + id_E, mask=in_E, other=0.0)[None, :]
        keys_TE = tl.where(in_E[None, :], _to_keys(choice_TE), NEVER)
        if NUM_GROUPS > 1:
            keys_TE = _close_groups(keys_TE, NUM_GROUPS, TOP_GROUPS, GROUPS_PAD, SIZE_PAD, BLOCK_T)

        ids_TK = tl.zeros((BLOCK_T, K_PAD), tl.int32)
        for k in range(K):
            keys_TE, id_T = _take_best(keys_TE, id_E)
            ids_TK = tl.where(k_K[None, :] == k, id_T[:, None], ids_TK)
        num_E = tl.sum(((keys_TE == TAKEN) & in_T[:, None]).to(tl.int32), axis=0)
        tl.atomic_add(counts_ptr + id_E, num_E.to(tl.int64), mask=in_E & (num_E > 0), sem="relaxed")

        # The chosen logits come again, from the cache: cheaper than a search in registers for each.
        m_TK = in_T[:, None] & in_K
        chosen_TK = tl.load(logits_ptr + row_T[:, None] * E + ids_TK, mask=m_TK, other=0.0).to(tl.float32)
        weights_TK = _weights(chosen_TK, in_K, top_T, total_T, WEIGHTING)
        o_TK = row_T[:, None] * K + k_K[None, :]
        tl.store(ids_ptr + o_TK, ids_TK.to(tl.int64), mask=m_TK)
        tl.store(weights_ptr + o_TK, weights_TK * scale, mask=m_TK)

    if SUMS_OF is not None:
        sums_ptr += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (E + 1)
        tl.store(sums_ptr + id_E, shares_E, mask=in_E)
        tl.store(sums_ptr + E, tl.sum(z_T, axis=0))


@triton.jit
def _chosen_gradient(g_TK, chosen_TK, valid, top_T, total_T, WEIGHTING: tl.constexpr):
    """Of the chosen logits; for softmax_of_all of their probabilities, and what to subtract for every expert.

    In the padding of K, g is zero.
    """
    if WEIGHTING == "softmax_of_all":
        probs_TK = tl.exp(chosen_TK - top_T[:, None]) / total_T[:, None]
        return g_TK, tl.sum(tl.where(valid, probs_TK, 0.0) * g_TK, axis=1)
    elif WEIGHTING == "softmax_of_chosen":
        top_T, total_T = _softmax_terms(chosen_TK, valid)
        shares_TK = tl.where(valid, tl.exp(chosen_TK - top_T[:, None]) / total_T[:, None], 0.0)
        dot_T = tl.sum(shares_TK * g_TK, axis=1)
        return shares_TK * (g_TK - dot_T[:, None]), dot_T
    else:
        scores_TK = tl.where(valid, _sigmoid(chosen_TK), 0.0)
        dot_T = tl.sum(scores_TK * g_TK, axis=1)
        if WEIGHTING == "sigmoid_share":
            total_T = tl.sum(scores_TK, axis=1) + EPS
            g_TK = (g_TK - (dot_T / total_T)[:, None]) / total_T[:, None]
        return g_TK * scores_TK * (1 - scores_TK), dot_T


@triton.jit
def _sums_gradient(grad_sums_ptr, logits_TE, valid, top_T, total_T, E: tl.constexpr, SUMS_OF: tl.constexpr):
    """What the sums of one sequence, whose gradients lie at grad_sums_ptr, add to the logits' gradient."""
    id_E = tl.arange(0, logits_TE.shape[1])
    g_E = tl.load(grad_sums_ptr + id_E, mask=id_E < E, other=0.0)
    g_z = tl.load(grad_sums_ptr + E)
    g_z_T = 2 * g_z * (top_T + tl.log(total_T)) / total_T
    of_z_TE = tl.exp(logits_TE - top_T[:, None]) * g_z_T[:, None]
    shares_TE, scores_TE = _shares(logits_TE, valid, top_T, total_T, SUMS_OF)
    of_shares_TE = shares_TE * (g_E[None, :] - tl.sum(shares_TE * g_E[None, :], axis=1)[:, None])
    if SUMS_OF == "sigmoid":
        of_shares_TE *= 1 - scores_TE
    return of_z_TE + of_shares_TE


@triton.jit(do_not_specialize=["T", "num_sequences"])
def topk_route_bwd_kernel(
    grad_weights_ptr,
    grad_sums_ptr,
    logits_ptr,
    ids_ptr,
    grad_logits_ptr,
    T,
    num_sequences,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    WEIGHTING: tl.constexpr,
    SUMS_OF: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The equations are those of the backward references. With SUMS_OF, rows of one sequence, as forward."""
    row_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    if SUMS_OF is not None:
        row_T = row_T * num_sequences + tl.program_id(1)
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
    logits_TE = tl.load(logits_ptr + o_TE, mask=m_TE, other=0.0).to(tl.float32)  # where used only
    top_T, total_T = _softmax_terms(logits_TE, in_E)
    chosen_grad_TK, dot_T = _chosen_gradient(g_TK, chosen_TK, in_K, top_T, total_T, WEIGHTING)

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
    if SUMS_OF is not None:
        grad_sums_ptr += tl.program_id(1).to(tl.int64) * (E + 1)
        grad_TE += _sums_gradient(grad_sums_ptr, logits_TE, m_TE, top_T, total_T, E, SUMS_OF)
    tl.store(grad_logits_ptr + o_TE, grad_TE.to(grad_logits_ptr.dtype.element_ty), mask=m_TE)
