"""Top-k routing: checks, then the torch backend. The Triton backend takes this place on CUDA.

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = ("softmax", "sigmoid")


def topk_route(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    score_before_topk: bool = True,
    renormalize: bool = False,
    scale: float = 1.0,
    bias_E: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the top-k experts of each token and their combine weights.

    Args:
        logits_TE: router outputs; computed in fp32 whatever the dtype.
        top_k: experts a token, K.
        score: `softmax` or `sigmoid` of the logits.
        score_before_topk: False takes the softmax over the K chosen logits only (Mixtral, arXiv 2401.04088).
        renormalize: divide the K weights by their sum.
        scale: multiplies the weights.
        bias_E: added for the choice only; no gradient, not in the weights (arXiv 2408.15664).

    Returns:
        ids_TK int64, best first, ties to the lower id; weights_TK fp32; counts_E int64.

    Raises:
        ValueError: for shapes, a score or a K that cannot work.
    """
    _check(logits_TE, top_k, score, score_before_topk, bias_E)
    logits_TE = logits_TE.float()
    scores_TE = _scores(logits_TE, score) if score_before_topk else logits_TE
    choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    # A stable sort, because torch.topk leaves the order of ties open.
    ids_TK = torch.sort(choice_TE, dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    weights_TK = scores_TE.gather(1, ids_TK)
    if not score_before_topk:
        weights_TK = weights_TK.softmax(dim=-1)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    counts_E = (ids_TK.flatten()[:, None] == torch.arange(logits_TE.shape[1], device=ids_TK.device)).sum(0)
    return ids_TK, weights_TK * scale, counts_E


def _scores(logits_TE: Tensor, score: str) -> Tensor:
    return logits_TE.sigmoid() if score == "sigmoid" else logits_TE.softmax(dim=-1)


def _check(logits_TE: Tensor, top_k: int, score: str, score_before_topk: bool, bias_E: Tensor | None) -> None:
    if logits_TE.dim() != 2:
        raise ValueError(f"logits must be [T, E], got shape {tuple(logits_TE.shape)}")
    E = logits_TE.shape[1]
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k={top_k} must be between 1 and the number of experts, {E}")
    if score not in SCORES:
        raise ValueError(f"score={score!r} is unknown; allowed: {', '.join(SCORES)}")
    if score == "sigmoid" and not score_before_topk:
        raise ValueError("score='sigmoid' is elementwise; it needs score_before_topk=True")
    if bias_E is not None and bias_E.shape != (E,):
        raise ValueError(f"bias must be [{E}], got shape {tuple(bias_E.shape)}")
