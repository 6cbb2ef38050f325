"""What keeps experts balanced: two losses and the bias rule. S sequence, B batch, E experts, K top-k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.layer.types import Losses, Routing

AUX_LOSSES = ("none", "sequence", "batch")


@dataclass(frozen=True)
class BalanceSettings:
    """Which losses, over which scope, how strong.

    Raises:
        ValueError: if aux_loss is none of AUX_LOSSES.
    """

    aux_loss: str = "sequence"
    aux_loss_coeff: float = 0.0
    z_loss_coeff: float = 0.0

    def __post_init__(self) -> None:
        if self.aux_loss not in AUX_LOSSES:
            raise ValueError(f"aux_loss={self.aux_loss!r} is unknown; allowed: {', '.join(AUX_LOSSES)}")


def router_losses(
    routing: Routing,
    sequence_length: int,
    settings: BalanceSettings,
    *,
    score: str,
    sequence_group: dist.ProcessGroup | None = None,
) -> Losses:
    """Balance and z loss of the tokens of this rank.

    Args:
        routing: of S*B tokens in sequence-first order (token t is position t // B of sequence t % B).
        sequence_length: S, the positions of each sequence that this rank holds.
        settings: scopes and coefficients.
        score: `softmax` or `sigmoid`; sigmoid scores are divided by their sum, as in DeepSeek-V3.
        sequence_group: ranks that hold the other positions of the same sequences (sequence parallelism).
            The returned values are this rank's share; their sum over the group is the loss.
    """
    parts = dist.get_world_size(sequence_group) if sequence_group is not None else 1
    logits_SBE = routing.logits_TE.unflatten(0, (sequence_length, -1))
    zero = routing.logits_TE.new_zeros(())
    balance, z = zero, zero
    if settings.aux_loss != "none" and settings.aux_loss_coeff > 0:
        balance = settings.aux_loss_coeff * _balance_loss(
            logits_SBE,
            routing.ids_TK,
            scope=settings.aux_loss,
            score=score,
            parts=parts,
            sequence_group=sequence_group,
        )
    if settings.z_loss_coeff > 0:
        z = settings.z_loss_coeff * logits_SBE.logsumexp(dim=-1).square().mean() / parts
    return Losses(balance, z)


def _balance_loss(
    logits_SBE: Tensor,
    ids_TK: Tensor,
    *,
    scope: str,
    score: str,
    parts: int,
    sequence_group: dist.ProcessGroup | None,
) -> Tensor:
    """E * sum_e f_e * P_e: f_e the share of routed pairs, P_e the mean score of expert e.

    Scope `batch` is the Switch Transformer's loss (arXiv 2101.03961, equation 4) generalised to top-k;
    `sequence` takes it in each sequence, then the mean (arXiv 2412.19437, equations 17-20).
    """
    S, B, E = logits_SBE.shape
    K = ids_TK.shape[1]
    if score == "sigmoid":
        scores_SBE = logits_SBE.sigmoid()
        probs_SBE = scores_SBE / (scores_SBE.sum(dim=-1, keepdim=True) + 1e-20)
    else:
        probs_SBE = logits_SBE.softmax(dim=-1)
    with torch.no_grad():
        chosen_SBE = torch.zeros_like(logits_SBE).view(S * B, E).scatter_(1, ids_TK, 1.0).view(S, B, E)
        counts_BE = chosen_SBE.sum(dim=0)
        if sequence_group is not None:
            dist.all_reduce(counts_BE, group=sequence_group)
        if scope == "batch":
            counts_BE = counts_BE.mean(dim=0, keepdim=True)
        fraction_BE = counts_BE / (S * parts * K)
    mean_probs_BE = probs_SBE.sum(dim=0) / (S * parts)
    return E * (fraction_BE * mean_probs_BE).sum(dim=-1).mean()


def updated_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """The bias after a step: up by `rate` for an expert below the mean load, down above (arXiv 2408.15664).

    Args:
        bias_E: fp32, or [..., E] for several layers at once.
        counts_E: tokens that chose each expert over the whole global batch, same shape.
        rate: the step, in score units.
    """
    counts_E = counts_E.to(torch.float32)
    return bias_E + rate * torch.sign(counts_E.mean(dim=-1, keepdim=True) - counts_E)


class _AttachLoss(torch.autograd.Function):
    """Identity whose backward also gives `loss` the gradient 1."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def attach_loss(y: Tensor, loss: Tensor) -> Tensor:
    """y, such that a backward through it also minimises `loss`.

    For a pipeline, where the stage that knows the loss is not the stage that starts the backward. The
    caller scales the loss (for example by 1 / microbatches): every backward injects a gradient of one.
    """
    out: Tensor = _AttachLoss.apply(y, loss)  # type: ignore[no-untyped-call]
    return out
