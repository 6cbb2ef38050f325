"""What keeps experts balanced: two losses and the bias rule. S sequence, B batch, E experts, K top-k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.layer.types import Losses, Routing

AUX_LOSSES = ("none", "sequence", "batch", "global")


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

    @property
    def balances(self) -> bool:
        """Whether there is a balance loss."""
        return self.aux_loss != "none" and self.aux_loss_coeff > 0

    def num_sequences(self, batch_size: int) -> int:
        """Sequences to sum over apart, for the router: wider scopes take all as one, no loss needs none."""
        if self.balances and self.aux_loss == "sequence":
            return batch_size
        return 1 if self.balances or self.z_loss_coeff > 0 else 0


def router_losses(
    routing: Routing,
    settings: BalanceSettings,
    *,
    sequence_group: dist.ProcessGroup | None = None,
    balance_group: dist.ProcessGroup | None = None,
) -> Losses:
    """Balance and z loss of the tokens of this rank, from the sums that routing left.

    The balance loss is E * sum_e f_e * P_e: f_e the share of routed pairs, P_e the mean score of expert e.
    Scope `batch` is the Switch Transformer's loss (arXiv 2101.03961, equation 4) generalised to top-k;
    `sequence` takes it in each sequence, then the mean (arXiv 2412.19437, equations 17-20); `global` takes
    f_e over the tokens of all ranks of the group, so that a rank may specialise (arXiv 2501.11873).

    Args:
        routing: with sums over settings.num_sequences.
        settings: scopes and coefficients.
        sequence_group: ranks that hold the other positions of the same sequences (sequence parallelism).
            The returned values are this rank's share; their sum over the group is the loss.
        balance_group: ranks whose tokens count for scope `global`, as many on each; the loss of a rank is its
            own, and their mean is the loss.

    Raises:
        ValueError: if a loss is on and the router has summed nothing.
    """
    zero = routing.weights_TK.new_zeros(())
    if settings.num_sequences(1) == 0:
        return Losses(zero, zero)
    sums = routing.sums
    if sums is None:
        raise ValueError("router losses need the sums of routing; give the router num_sequences")
    T, K = routing.ids_TK.shape
    B, E = sums.shares_BE.shape
    parts = dist.get_world_size(sequence_group) if sequence_group is not None else 1
    length = T // B * parts  # of a whole sequence
    balance, z = zero, zero
    if settings.balances:
        counts_BE = sums.counts_BE.to(sums.shares_BE.dtype)
        if sequence_group is not None:
            dist.all_reduce(counts_BE, group=sequence_group)
        if settings.aux_loss == "global" and balance_group is not None:
            dist.all_reduce(counts_BE, group=balance_group)
            counts_BE /= dist.get_world_size(balance_group)
        share_BE = counts_BE / (length * K) * (sums.shares_BE / length)
        balance = settings.aux_loss_coeff * E * share_BE.sum(dim=1).mean()
    if settings.z_loss_coeff > 0:
        z = settings.z_loss_coeff * sums.z_B.mean() / length
    return Losses(balance, z)


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
