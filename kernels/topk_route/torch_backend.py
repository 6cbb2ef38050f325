"""Top-k routing in plain torch, with torch's own gradient.

Shapes: T tokens, E experts, K top-k, G groups, B sequences, X = E + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-20  # as in DeepSeek-V3's code: sigmoids that all vanish leave zeros, not NaN


def topk_route_torch(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    *,
    choice: str,
    weighting: str,
    scale: float,
    num_groups: int,
    top_groups: int,
    sums_of: str | None,
    num_sequences: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids and weights of `topk_route`, counts_BE, and sums_BX, whose last column is the sum for the z loss.

    Arguments are as `topk_route` has checked and reduced them.

    Args:
        logits_TE: any floating dtype; computed in fp32, or in float64 if it is that.
        bias_E: fp32, added for the choice.
        top_k: K.
        choice: what ranks the experts: `logits`, `softmax` or `sigmoid`.
        weighting: what the weights are: `softmax_of_chosen`, `softmax_of_all`, `sigmoid`, `sigmoid_share`.
        scale: multiplies the weights.
        num_groups: G.
        top_groups: groups that a token may use.
        sums_of: the scores whose shares are summed, `softmax` or `sigmoid`; None leaves sums_BX without rows.
        num_sequences: B; token t belongs to sequence t % B.
    """
    if logits_TE.dtype != torch.float64:
        logits_TE = logits_TE.float()
    with torch.no_grad():
        choice_TE = _choice_scores(logits_TE, choice)
        if bias_E is not None:
            choice_TE = choice_TE + bias_E
        if num_groups > 1:
            choice_TE = _close_groups(choice_TE, num_groups, top_groups)
        ids_TK = _first(choice_TE, top_k)
        ids_BN = ids_TK.unflatten(0, (-1, num_sequences)).transpose(0, 1).flatten(1)
        counts_BE = logits_TE.new_zeros(num_sequences, logits_TE.shape[1], dtype=torch.int64)
        counts_BE = counts_BE.scatter_add(1, ids_BN, torch.ones_like(ids_BN))
    sums_BX = _sums(logits_TE, sums_of, num_sequences)
    return ids_TK, _weights(logits_TE, ids_TK, weighting) * scale, counts_BE, sums_BX


def _sums(logits_TE: Tensor, sums_of: str | None, num_sequences: int) -> Tensor:
    if sums_of is None:
        return logits_TE.new_empty(0, logits_TE.shape[1] + 1)
    if sums_of == "softmax":
        shares_TE = logits_TE.softmax(dim=-1)
    else:
        scores_TE = logits_TE.sigmoid()
        shares_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + EPS)
    z_T1 = logits_TE.logsumexp(dim=-1, keepdim=True).square()
    sums = [values.unflatten(0, (-1, num_sequences)).sum(dim=0) for values in (shares_TE, z_T1)]
    return torch.cat(sums, dim=1)


def _choice_scores(logits_TE: Tensor, choice: str) -> Tensor:
    if choice == "softmax":
        return logits_TE.softmax(dim=-1)
    return logits_TE.sigmoid() if choice == "sigmoid" else logits_TE


def _close_groups(choice_TE: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """-inf for experts outside the top groups; a group counts for its two best (arXiv 2412.19437, 2.1.2)."""
    choice_TGe: Tensor = choice_TE.unflatten(1, (num_groups, -1))
    open_TG = _first(choice_TGe.topk(2, dim=-1).values.sum(dim=-1), top_groups)
    closed_TG = torch.ones(choice_TGe.shape[:2], dtype=torch.bool, device=choice_TE.device)
    closed_TG = closed_TG.scatter(1, open_TG, False)
    return choice_TGe.masked_fill(closed_TG[:, :, None], -torch.inf).flatten(1)


def _first(values: Tensor, count: int) -> Tensor:
    """Places of the largest in each row. A stable sort, because torch.topk leaves the order of ties open."""
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    return order[:, :count].contiguous()


def _weights(logits_TE: Tensor, ids_TK: Tensor, weighting: str) -> Tensor:
    if weighting == "softmax_of_all":
        return logits_TE.softmax(dim=-1).gather(1, ids_TK)
    chosen_TK = logits_TE.gather(1, ids_TK)
    if weighting == "softmax_of_chosen":
        return chosen_TK.softmax(dim=-1)
    scores_TK = chosen_TK.sigmoid()
    if weighting == "sigmoid":
        return scores_TK
    return scores_TK / (scores_TK.sum(dim=-1, keepdim=True) + EPS)
