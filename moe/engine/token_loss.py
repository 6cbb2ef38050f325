"""The loss of a micro-batch, the same for every engine."""

from __future__ import annotations

from torch import Tensor


def token_loss(mask_BS: Tensor, labels_BS: Tensor, nll_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of a micro-batch, and what evaluation sums; cloned, for the schedule divides it in place."""
    nll = (nll_BS.float() * mask_BS).sum()
    loss = nll / mask_BS.sum().clamp(min=1)
    return loss, {"loss": loss.detach().clone(), "nll": nll.detach(), "mask": mask_BS, "labels": labels_BS}
