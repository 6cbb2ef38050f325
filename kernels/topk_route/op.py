"""Top-k routing: the public function, its checks, and the choice of the backend.

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels.backend import choose_backend
from moe.kernels.topk_route.torch_backend import topk_route_torch
from moe.kernels.topk_route.triton_op import topk_route_triton

SCORES = ("softmax", "sigmoid")
# The Triton kernel holds whole rows in registers and takes K rounds over them.
MAX_TRITON_EXPERTS = 1024
MAX_TRITON_TOP_K = 16
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def topk_route(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    score_before_topk: bool = True,
    renormalize: bool = False,
    scale: float = 1.0,
    bias_E: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the top-k experts of each token and their combine weights.

    Without a bias and without groups, experts are ranked by their logits: every score ranks alike, but
    rounding makes distinct logits equal scores.

    Args:
        logits_TE: router outputs; computed in fp32 whatever the dtype (float64 stays float64).
        top_k: experts a token, K.
        score: `softmax` or `sigmoid` of the logits.
        score_before_topk: False takes the softmax over the K chosen logits only (Mixtral, arXiv 2401.04088).
        renormalize: divide the K weights by their sum.
        scale: multiplies the weights.
        bias_E: added for the choice only; no gradient, not in the weights (arXiv 2408.15664).
        num_groups: equal groups of neighbouring experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
        top_groups: a token's experts come from so many groups, those with the largest sum of their two
            best scores (bias included).
        backend: `auto` (triton on CUDA, torch elsewhere), `triton` or `torch`. Triton goes up to 1024 experts
            and K = 16.

    Returns:
        ids_TK int64, best first, ties (of groups, too) to the lower id; weights_TK fp32; counts_E int64.

    Raises:
        ValueError: for shapes, a score, a K, groups or a backend that cannot work.
    """
    _check(logits_TE, top_k, score, score_before_topk, bias_E)
    _check_groups(logits_TE.shape[1], top_k, num_groups, top_groups)
    ranks_by_logits = not score_before_topk or (bias_E is None and num_groups == 1)
    route = topk_route_torch
    if choose_backend(backend, logits_TE) == "triton":
        _check_triton(logits_TE, top_k)
        route = topk_route_triton
    return route(
        logits_TE,
        None if bias_E is None else bias_E.detach().float(),
        top_k,
        choice="logits" if ranks_by_logits else score,
        weighting=_weighting(score, score_before_topk, renormalize),
        scale=scale,
        num_groups=num_groups,
        top_groups=top_groups,
    )


def _weighting(score: str, score_before_topk: bool, renormalize: bool) -> str:
    """What the weights are; renormalised softmax is the softmax of the chosen, for the sum over E cancels."""
    if score == "sigmoid":
        return "sigmoid_share" if renormalize else "sigmoid"
    return "softmax_of_chosen" if renormalize or not score_before_topk else "softmax_of_all"


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


def _check_groups(num_experts: int, top_k: int, num_groups: int, top_groups: int) -> None:
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"top_groups={top_groups} must be between 1 and num_groups, {num_groups}")
    if num_groups == 1:
        return
    size = num_experts // num_groups
    if size < 2 or num_experts % num_groups:
        raise ValueError(
            f"num_groups={num_groups} must divide the {num_experts} experts into groups of two or more"
        )
    if top_k > top_groups * size:
        raise ValueError(
            f"top_k={top_k} is more than the {top_groups * size} experts of top_groups={top_groups}; "
            "raise top_groups"
        )


def _check_triton(logits_TE: Tensor, top_k: int) -> None:
    E = logits_TE.shape[1]
    if E > MAX_TRITON_EXPERTS or top_k > MAX_TRITON_TOP_K:
        raise ValueError(
            f"backend='triton' routes to at most {MAX_TRITON_EXPERTS} experts with top_k up to "
            f"{MAX_TRITON_TOP_K}, got {E} and {top_k}; use backend='torch'"
        )
    if logits_TE.dtype not in TRITON_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in TRITON_DTYPES)
        raise ValueError(
            f"backend='triton' takes logits of {allowed}, got {logits_TE.dtype}; use backend='torch'"
        )
