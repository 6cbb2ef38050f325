"""The loss of a micro-batch, the same for every engine."""

from __future__ import annotations

from torch import Tensor


def token_loss(
    mask_BS: Tensor, labels_BS: Tensor, nll_BS: Tensor, *, num_tokens: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of a micro-batch, and what evaluation sums; cloned, for the schedule divides it in place.

    Args:
        mask_BS: 1 where the loss counts.
        labels_BS: ids.
        nll_BS: nats.
        num_tokens: that count, where this rank holds a part of the sequences: then the result is its share of
            the mean. None: all are here.
    """
    nll = (nll_BS.float() * mask_BS).sum()
    loss = nll / (mask_BS.sum() if num_tokens is None else num_tokens).clamp(min=1)
    return loss, {"loss": loss.detach().clone(), "nll": nll.detach(), "mask": mask_BS, "labels": labels_BS}
