"""Top-k routing, written to be obvious: the oracle of every faster version.

Shapes: T tokens, E experts, K top-k, B sequences. fp32, or float64 if the logits are.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-20  # keeps a share of vanishing sigmoid scores finite (DeepSeek-V3's code)


def topk_route_reference(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: str,
    score_before_topk: bool,
    renormalize: bool,
    scale: float,
    bias_E: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `topk_route`, one token at a time."""
    T, E = logits_TE.shape
    logits_TE = _wide(logits_TE)
    ids_TK = torch.empty(T, top_k, dtype=torch.int64, device=logits_TE.device)
    rows = []
    for t in range(T):
        logits_E = logits_TE[t]
        if score == "sigmoid":
            scores_E = logits_E.sigmoid()
        elif score_before_topk:
            scores_E = logits_E.softmax(dim=0)
        else:
            scores_E = logits_E
        if bias_E is None and num_groups == 1:
            choice_E = logits_E  # ranks as the scores do, before rounding makes some of them equal
        else:
            choice_E = scores_E if bias_E is None else scores_E + bias_E
        best = _best_experts(choice_E.tolist(), top_k, num_groups, top_groups, choice_E.dtype)
        ids_TK[t] = torch.tensor(best)
        if score == "softmax" and (renormalize or not score_before_topk):
            weights_K = logits_E[best].softmax(dim=0)  # p_i / sum_k p_k, where the sum over E cancels
        elif renormalize:
            weights_K = scores_E[best] / (scores_E[best].sum() + EPS)
        else:
            weights_K = scores_E[best]
        rows.append(weights_K * scale)
    weights_TK = torch.stack(rows) if rows else logits_TE[:, :top_k]  # of no row; part of the graph
    counts_E = torch.tensor([int((ids_TK == e).sum()) for e in range(E)], device=logits_TE.device)
    return ids_TK, weights_TK, counts_E


def topk_route_backward_reference(
    grad_weights_TK: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    *,
    score: str,
    score_before_topk: bool,
    renormalize: bool,
    scale: float,
) -> Tensor:
    """The gradient of the logits, as equations. In them p are the scores that are chosen, S their shares.

    softmax over the chosen      S_k (g_k - sum S g) for the chosen, 0 for the others
    softmax over all             p_j ([j chosen] g_j - sum p g) for every expert j
    sigmoid                      g p (1 - p)
    sigmoid, renormalised        (g - sum S g) / sum p  *  p (1 - p)
    """
    logits_TE = _wide(logits_TE)
    g_TK = grad_weights_TK.to(logits_TE.dtype) * scale
    chosen_TK = logits_TE.gather(1, ids_TK)
    zeros_TE = torch.zeros_like(logits_TE)
    if score == "softmax" and score_before_topk and not renormalize:
        probs_TE = logits_TE.softmax(dim=-1)
        dot_T1 = (probs_TE.gather(1, ids_TK) * g_TK).sum(dim=-1, keepdim=True)
        return probs_TE * (zeros_TE.scatter(1, ids_TK, g_TK) - dot_T1)
    if score == "softmax":
        shares_TK = chosen_TK.softmax(dim=-1)
        grad_TK = shares_TK * (g_TK - (shares_TK * g_TK).sum(dim=-1, keepdim=True))
    else:
        scores_TK = chosen_TK.sigmoid()
        if renormalize:
            total_T1 = scores_TK.sum(dim=-1, keepdim=True) + EPS
            g_TK = (g_TK - (scores_TK / total_T1 * g_TK).sum(dim=-1, keepdim=True)) / total_T1
        grad_TK = g_TK * scores_TK * (1 - scores_TK)
    return zeros_TE.scatter(1, ids_TK, grad_TK)


def route_sums_reference(
    logits_TE: Tensor, ids_TK: Tensor, num_sequences: int, *, score: str
) -> tuple[Tensor, Tensor, Tensor]:
    """counts_BE, shares_BE and z_B of `topk_route_with_sums`, one token at a time."""
    logits_TE = _wide(logits_TE)
    counts_BE = torch.zeros(num_sequences, logits_TE.shape[1], dtype=torch.int64, device=logits_TE.device)
    shares = [torch.zeros_like(logits_TE[0]) for _ in range(num_sequences)]
    z = [logits_TE.new_zeros(()) for _ in range(num_sequences)]
    for t, logits_E in enumerate(logits_TE):
        b = t % num_sequences
        counts_BE[b, ids_TK[t]] += 1
        scores_E = logits_E.sigmoid() if score == "sigmoid" else logits_E.softmax(dim=0)
        shares[b] = shares[b] + (scores_E / (scores_E.sum() + EPS) if score == "sigmoid" else scores_E)
        z[b] = z[b] + logits_E.logsumexp(dim=0) ** 2
    return counts_BE, torch.stack(shares), torch.stack(z)


def route_sums_backward_reference(
    grad_shares_BE: Tensor, grad_z_B: Tensor, logits_TE: Tensor, *, score: str
) -> Tensor:
    """What the sums add to the logits' gradient, as equations. G and g are those of the token's sequence.

    shares of a softmax      p_j (G_j - sum p G)
    shares of sigmoids       q_j (G_j - sum q G) (1 - s_j)     with q = s / sum s
    z                        2 g log(sum exp(logits)) p_j
    """
    logits_TE = _wide(logits_TE)
    sequence_T = torch.arange(logits_TE.shape[0]) % grad_z_B.shape[0]
    g_TE, g_z_T1 = grad_shares_BE[sequence_T], grad_z_B[sequence_T, None]
    probs_TE = logits_TE.softmax(dim=-1)
    grad_TE = 2 * g_z_T1 * logits_TE.logsumexp(dim=-1, keepdim=True) * probs_TE
    if score == "softmax":
        return grad_TE + probs_TE * (g_TE - (probs_TE * g_TE).sum(dim=-1, keepdim=True))
    scores_TE = logits_TE.sigmoid()
    shares_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + EPS)
    dot_T1 = (shares_TE * g_TE).sum(dim=-1, keepdim=True)
    return grad_TE + shares_TE * (g_TE - dot_T1) * (1 - scores_TE)


def _best_experts(
    choice_E: list[float], top_k: int, num_groups: int, top_groups: int, dtype: torch.dtype
) -> list[int]:
    """Best first, ties to the lower id, from the best groups only."""
    size = len(choice_E) // num_groups
    if num_groups > 1:
        groups = [choice_E[g * size : (g + 1) * size] for g in range(num_groups)]
        # The sum of a group's two best, rounded as a tensor of this dtype rounds it.
        worth = [torch.tensor(sorted(group)[-2:], dtype=dtype).sum().item() for group in groups]
        open_groups = _best(worth, range(num_groups), top_groups)
    else:
        open_groups = [0]
    candidates = [e for e in range(len(choice_E)) if e // size in open_groups]
    return _best(choice_E, candidates, top_k)


def _best(values: list[float], candidates: list[int] | range, count: int) -> list[int]:
    return sorted(candidates, key=lambda i: (-values[i], i))[:count]


def _wide(logits_TE: Tensor) -> Tensor:
    return logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
