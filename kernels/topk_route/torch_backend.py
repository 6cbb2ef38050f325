"""Top-k routing in plain torch, with torch's own gradient. T tokens, E experts, K top-k, G groups."""

from __future__ import annotations

import torch
from torch import Tensor


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns of `topk_route`; arguments as `topk_route` has checked and reduced them.

    Args:
        logits_TE: any floating dtype; computed in fp32, or in float64 if it is that.
        bias_E: fp32, added for the choice.
        top_k: K.
        choice: what ranks the experts: `logits`, `softmax` or `sigmoid`.
        weighting: what the weights are: `softmax_of_chosen`, `softmax_of_all`, `sigmoid`, `sigmoid_share`.
        scale: multiplies the weights.
        num_groups: G.
        top_groups: groups that a token may use.
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
        counts_E = torch.zeros(logits_TE.shape[1], dtype=torch.int64, device=logits_TE.device)
        counts_E = counts_E.scatter_add(0, ids_TK.flatten(), torch.ones_like(ids_TK).flatten())
    return ids_TK, _weights(logits_TE, ids_TK, weighting) * scale, counts_E


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
    # 1e-20 as in DeepSeek-V3's code: sigmoids that all vanish leave zeros, not NaN.
    return scores_TK / (scores_TK.sum(dim=-1, keepdim=True) + 1e-20)
