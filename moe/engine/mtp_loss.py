"""What Megatron's loss of multi-token prediction lacks under context parallelism."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor


@contextlib.contextmanager
def mean_over_sequence(cp_group: dist.ProcessGroup) -> Iterator[None]:
    """Inside the context Megatron divides a rank's sum of losses by the mean count over the group.

    megatron-core 0.16.1 to 0.19.1 divide it by the rank's own count, and the last place of a sequence, which
    has no further token, belongs to one rank: the mean of the ranks' means is then not the mean over tokens.
    """
    if cp_group.size() == 1:
        yield
        return
    # Where the loss is computed: in its own function from 0.17 on.
    owner = multi_token_prediction if hasattr(multi_token_prediction, "process_mtp_loss") else gpt_model
    roll: Callable[..., tuple[Tensor, Tensor]] = owner.roll_tensor

    def roll_and_average(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rolled, count = roll(*args, **kwargs)
        dist.all_reduce(count, group=cp_group)
        return rolled, count / cp_group.size()

    owner.roll_tensor = roll_and_average
    try:
        yield
    finally:
        owner.roll_tensor = roll


def forget_mtp_losses() -> None:
    """Begin a step: Megatron sums over micro-batches in a global."""
    MTPLossLoggingHelper.tracker.clear()


def summed_mtp_loss() -> Tensor | None:
    """Mean over the modules of what this rank summed over micro-batches; None on ranks without them."""
    tracker = MTPLossLoggingHelper.tracker
    values: Tensor | None = tracker.get("loss_values", tracker.get("values"))  # 0.19's name, 0.16's
    return None if values is None else values.mean()
