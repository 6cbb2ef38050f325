"""Top-k routing, written to be obvious: the oracle of every faster version.

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk_route_reference(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: str,
    score_before_topk: bool,
    renormalize: bool,
    scale: float,
    bias_E: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `topk_route`, one token at a time."""
    T, E = logits_TE.shape
    ids_TK = torch.empty(T, top_k, dtype=torch.int64, device=logits_TE.device)
    rows = []
    for t in range(T):
        logits_E = logits_TE[t].float()
        if score == "sigmoid":
            scores_E = logits_E.sigmoid()
        elif score_before_topk:
            scores_E = logits_E.softmax(dim=0)
        else:
            scores_E = logits_E
        choice_E = (scores_E if bias_E is None else scores_E + bias_E).tolist()
        best = sorted(range(E), key=lambda e: (-choice_E[e], e))[:top_k]  # ties go to the lower id
        ids_TK[t] = torch.tensor(best)
        weights_K = scores_E[best]
        if not score_before_topk:
            weights_K = weights_K.softmax(dim=0)
        if renormalize:
            weights_K = weights_K / (weights_K.sum() + 1e-20)
        rows.append(weights_K * scale)
    weights_TK = torch.stack(rows) if rows else logits_TE.new_empty(0, top_k, dtype=torch.float32)
    counts_E = torch.tensor([int((ids_TK == e).sum()) for e in range(E)], device=logits_TE.device)
    return ids_TK, weights_TK, counts_E
