"""QK-clip in the Megatron engine: after each update, before the new weights go to the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.config.schema import AttentionSection
from moe.model.context_parallel import SequenceSplit
from moe.optim.qk_clip import LargestLogits, row_factors


@dataclass(frozen=True)
class Slice:
    """This rank's fp32 slice of a parameter.

    Attributes:
        main: Flat.
        first: Place of its first element in the parameter.
        columns: Elements of a row.
    """

    main: Tensor
    first: int
    columns: int

    def scale_rows(self, factors: Tensor) -> None:
        """Multiply by the factors of all the parameter's rows."""
        end = self.first + self.main.numel()
        first_row = self.first // self.columns
        repeated = factors[first_row : -(-end // self.columns)].repeat_interleave(self.columns)
        start = self.first - first_row * self.columns
        self.main.mul_(repeated[start : start + self.main.numel()])


class QkClip:
    """Notes the logits of a rank's attentions and scales its slices of their weights."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        slices: dict[Tensor, Slice],
        *,
        attention: AttentionSection,
        tau: float,
        dp_group: dist.ProcessGroup,
    ) -> None:
        """Begin to note.

        Args:
            models: All chunks of this rank.
            slices: By parameter.
            attention: Sizes.
            tau: Largest logit that is left alone.
            dp_group: Ranks that see other positions or sequences with the same weights.
        """
        self.attention, self.tau, self.dp_group = attention, tau, dp_group
        self.layers = [layer for model in models for layer in _attentions(model)]
        self.slices = [
            [(name, slices[p]) for name, p in layer.named_parameters() if p in slices]
            for layer in self.layers
        ]
        for layer in self.layers:
            layer.split.logits = LargestLogits()
        # Logit of the last step before clipping; it stays below all others on a stage without attention.
        self.largest = torch.tensor(-torch.inf)

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        """Scale; collective. A hook of the optimizer that has the slices."""
        if not self.layers:
            return
        largest_LH = torch.stack([layer.split.logits.take() for layer in self.layers])
        dist.all_reduce(largest_LH, op=dist.ReduceOp.MAX, group=self.dp_group)
        self.largest = largest_LH.max()
        gamma_LH = self.tau / largest_LH.clamp(min=self.tau)
        for gamma_H, slices in zip(gamma_LH, self.slices, strict=True):
            for name, piece in slices:
                factors = row_factors(name, gamma_H, self.attention)
                if factors is not None:
                    piece.scale_rows(factors)


def _attentions(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(getattr(module, "split", None), SequenceSplit))
