"""The MoE layer as its papers write it, one token and one expert at a time, in the dtype of its input.

Shapes: S sequence, B batch, T = S*B tokens, D model, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def dense_moe(x_TD: Tensor, parameters: Mapping[str, Tensor], router: Mapping[str, Any]) -> Tensor:
    """y_TD.

    Args:
        x_TD: tokens.
        parameters: of a MoELayer, by the names of its named_parameters.
        router: the settings of a Router, by the names of its attributes, bias_E included.
    """
    return torch.stack([_one_token(x_D, parameters, router) for x_D in x_TD])


def _one_token(x_D: Tensor, parameters: Mapping[str, Tensor], router: Mapping[str, Any]) -> Tensor:
    logits_E = parameters["router.weight_ED"] @ x_D
    y_D = torch.zeros_like(x_D)
    for expert, weight in weights_of(logits_E, router).items():
        gate_up = parameters["experts.w_gate_up_eGD"][expert]
        y_D = y_D + weight * swiglu(x_D, gate_up, parameters["experts.w_down_eDF"][expert])
    if "shared_expert.w_down_DF" in parameters:
        y_D = y_D + swiglu(
            x_D, parameters["shared_expert.w_gate_up_GD"], parameters["shared_expert.w_down_DF"]
        )
    return y_D


def weights_of(logits_E: Tensor, router: Mapping[str, Any]) -> dict[int, Tensor]:
    """The chosen experts, best first, and their combine weights."""
    scores_E = logits_E.sigmoid() if router["score"] == "sigmoid" else logits_E.softmax(dim=0)
    # Without score_before_topk the bias is added to logits, and then the choice may be another.
    choice_E = (scores_E if router["score_before_topk"] else logits_E) + router["bias_E"]
    experts = _open_experts(choice_E.tolist(), router["num_groups"], router["top_groups"])
    chosen = sorted(experts, key=lambda e: (-choice_E[e].item(), e))[: router["top_k"]]
    weights_K = scores_E[chosen]
    if router["renormalize"] or not router["score_before_topk"]:
        weights_K = weights_K / weights_K.sum()
    return dict(zip(chosen, weights_K * router["scale"], strict=True))


def _open_experts(choice: list[float], num_groups: int, top_groups: int) -> list[int]:
    """Experts of the groups with the largest sums of their two best (arXiv 2412.19437, section 2.1.2)."""
    if num_groups == 1:
        return list(range(len(choice)))
    size = len(choice) // num_groups
    groups = [list(range(first, first + size)) for first in range(0, len(choice), size)]
    groups.sort(key=lambda group: -sum(sorted(choice[e] for e in group)[-2:]))
    return [e for group in groups[:top_groups] for e in group]


def swiglu(x_D: Tensor, gate_up_GD: Tensor, down_DF: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)); gate rows come first."""
    gate_FD, up_FD = gate_up_GD.chunk(2)
    gate_F = gate_FD @ x_D
    return down_DF @ (gate_F * gate_F.sigmoid() * (up_FD @ x_D))


def balance_loss(logits_SBE: Tensor, ids_SBK: Tensor, *, scope: str, score: str) -> Tensor:
    """Without its coefficient: sum_e f_e P_e of each sequence, or of the batch as if it were one sequence.

    f_e = E / (K T) * the number of the T tokens that chose e, P_e = the mean of e's share of a token's scores
    (arXiv 2412.19437, equations 17-20; arXiv 2101.03961, equations 4-6, where K = 1).
    """
    S, B, E = logits_SBE.shape
    if scope == "sequence":
        sequences = [[(s, b) for s in range(S)] for b in range(B)]
    else:
        sequences = [[(s, b) for s in range(S) for b in range(B)]]
    total = logits_SBE.new_zeros(())
    for tokens in sequences:
        for e in range(E):
            chosen = sum(e in ids_SBK[token].tolist() for token in tokens)
            f = E / (ids_SBK.shape[-1] * len(tokens)) * chosen
            P = sum(_probabilities(logits_SBE[token], score)[e] for token in tokens) / len(tokens)
            total = total + f * P
    return total / len(sequences)


def _probabilities(logits_E: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return logits_E.softmax(dim=0)
    return logits_E.sigmoid() / logits_E.sigmoid().sum()


def z_loss(logits_SBE: Tensor) -> Tensor:
    """Without its coefficient: the mean square of log sum_e exp(logit_e) (arXiv 2202.08906, equation 5)."""
    return torch.stack([logit_E.exp().sum().log() ** 2 for logit_E in logits_SBE.flatten(0, 1)]).mean()
