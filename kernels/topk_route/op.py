"""Top-k routing: the public functions, their checks, and the choice of the backend.

Shapes: T tokens, E experts, K top-k, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.kernels.backend import choose_backend
from moe.kernels.topk_route.torch_backend import topk_route_torch
from moe.kernels.topk_route.triton_op import topk_route_triton

SCORES = ("softmax", "sigmoid")
# The Triton kernel holds whole rows in registers and takes K rounds over them.
MAX_TRITON_EXPERTS = 1024
MAX_TRITON_TOP_K = 16
MAX_SEQUENCES = 65_535  # the second axis of a launch on CUDA
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
    ids_TK, weights_TK, counts_1E, _ = _route(
        logits_TE,
        top_k,
        score=score,
        score_before_topk=score_before_topk,
        renormalize=renormalize,
        scale=scale,
        bias_E=bias_E,
        num_groups=num_groups,
        top_groups=top_groups,
        backend=backend,
    )
    return ids_TK, weights_TK, counts_1E.squeeze(0)


@dataclass(frozen=True)
class RouteSums:
    """What router losses are made of: sums over the tokens of each sequence, to which gradients flow.

    Attributes:
        counts_BE: int64, tokens that chose each expert.
        shares_BE: fp32, sums of each expert's share of a token's scores: its softmax over all experts, or its
            sigmoid over the sum of all sigmoids (arXiv 2412.19437, equation 19).
        z_B: fp32, sums of log(sum(exp(logits)))^2 (arXiv 2202.08906, equation 5).
    """

    counts_BE: Tensor
    shares_BE: Tensor
    z_B: Tensor


def topk_route_with_sums(
    logits_TE: Tensor,
    top_k: int,
    *,
    num_sequences: int,
    score: str = "softmax",
    score_before_topk: bool = True,
    renormalize: bool = False,
    scale: float = 1.0,
    bias_E: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, RouteSums]:
    """`topk_route`, and from the same pass over the logits, forward and backward, what router losses need.

    Sums are taken in an order that depends on the shape only.

    Args:
        logits_TE: as in `topk_route`.
        top_k: as in `topk_route`.
        num_sequences: B. Token t belongs to sequence t % B, as in hidden states [S, B, D]; one sequence takes
            all tokens.
        score: as in `topk_route`; and its shares are summed.
        score_before_topk: as in `topk_route`; shares are always those among all experts.
        renormalize: as in `topk_route`.
        scale: as in `topk_route`; shares are not scaled.
        bias_E: as in `topk_route`; not in the shares.
        num_groups: as in `topk_route`.
        top_groups: as in `topk_route`.
        backend: as in `topk_route`.

    Returns:
        ids_TK and weights_TK of `topk_route`, and the sums.

    Raises:
        ValueError: as `topk_route`, or if the tokens are not num_sequences equally long sequences.
    """
    ids_TK, weights_TK, counts_BE, sums_BX = _route(
        logits_TE,
        top_k,
        score=score,
        score_before_topk=score_before_topk,
        renormalize=renormalize,
        scale=scale,
        bias_E=bias_E,
        num_groups=num_groups,
        top_groups=top_groups,
        backend=backend,
        sums_of=score,
        num_sequences=num_sequences,
    )
    return ids_TK, weights_TK, RouteSums(counts_BE, sums_BX[:, :-1], sums_BX[:, -1])


def _route(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: str,
    score_before_topk: bool,
    renormalize: bool,
    scale: float,
    bias_E: Tensor | None,
    num_groups: int,
    top_groups: int,
    backend: str,
    sums_of: str | None = None,
    num_sequences: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(logits_TE, top_k, score, score_before_topk, bias_E)
    _check_groups(logits_TE.shape[1], top_k, num_groups, top_groups)
    _check_sequences(logits_TE.shape[0], num_sequences)
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
        sums_of=sums_of,
        num_sequences=num_sequences,
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


def _check_sequences(num_tokens: int, num_sequences: int) -> None:
    if not 1 <= num_sequences <= MAX_SEQUENCES or num_tokens % num_sequences:
        raise ValueError(
            f"num_sequences={num_sequences} must divide the {num_tokens} tokens into equally long sequences, "
            f"at most {MAX_SEQUENCES}"
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
