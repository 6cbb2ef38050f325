"""Sequences split over context-parallel ranks: two pieces each, so that causal attention is shared evenly.

A sequence is cut into 2 * cp pieces; rank i holds pieces i and 2 * cp - 1 - i, an early and a late one (ring
attention's zigzag, as in Megatron-Core and in Llama 3, arXiv 2407.21783, section 3.3.2). Keys and values are
gathered from all ranks; the gradient comes back by reduce-scatter.

Shapes: S positions of the whole sequence, C = S / cp of this rank, c = C / tp under sequence parallelism.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from moe.model.sdpa import causal_attention
from moe.optim.qk_clip import LargestLogits


def positions_of(rank: int, cp: int, length: int, device: torch.device) -> Tensor:
    """Places in the whole sequence of the `length` positions that a rank holds, in their order there."""
    if cp == 1:
        return torch.arange(length, device=device)
    piece = length // 2
    early, late = (torch.arange(piece, device=device) + piece * i for i in (rank, 2 * cp - 1 - rank))
    return torch.cat([early, late])


class LogitsKnown:
    """Hides what notes logits; opened once for each backward, of which a retained graph can have several."""

    def __init__(self, split: SequenceSplit) -> None:
        self.split, self.hidden = split, split.logits

    def __enter__(self) -> None:
        self.hidden, self.split.logits = self.split.logits, None

    def __exit__(self, *_: object) -> None:
        self.split.logits = self.hidden


class SequenceSplit:
    """What an attention needs to know of the ranks that hold the other positions of its sequences."""

    def __init__(self, cp_group: dist.ProcessGroup, tp_group: dist.ProcessGroup) -> None:
        self.cp_group, self.cp, self.rank = cp_group, cp_group.size(), cp_group.rank()
        self.tp = tp_group.size()
        self.logits: LargestLogits | None = None  # set where QK-clip asks for them

    def logits_known(self) -> LogitsKnown:
        """Open while attention is computed again: QK-clip noted its logits the first time."""
        return LogitsKnown(self)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Places of this rank's positions, for rotary embeddings."""
        return positions_of(self.rank, self.cp, length, device)

    def gather(self, x: Tensor) -> Tensor:
        """Those of all ranks, one rank after another, in the first dimension; the gradient is summed back."""
        if self.cp == 1:
            return x
        gathered: Tensor = gather_from_sequence_parallel_region(x, group=self.cp_group)
        return gathered

    def in_order(self, x: Tensor, *, gathered_before_tp: bool = False) -> Tensor:
        """What `gather` gave, in the order of the sequence.

        Args:
            x: [S, ...].
            gathered_before_tp: each tensor-parallel rank gathered its part, and those parts followed each
                other afterwards; False: what was gathered was whole on each tensor-parallel rank.
        """
        if self.cp == 1:
            return x
        length = x.shape[0] // self.cp
        parts = self.tp if gathered_before_tp else 1
        held = torch.stack([positions_of(rank, self.cp, length, x.device) for rank in range(self.cp)])
        places_S = held.unflatten(1, (parts, -1)).transpose(0, 1).flatten()
        return x.index_select(0, places_S.argsort())

    def attend(
        self,
        q_CBHd: Tensor,
        k_SBGd: Tensor,
        v_SBGv: Tensor,
        *,
        scale: float,
        window: int = 0,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of this rank's positions to all; arguments as of `causal_attention`.

        Returns:
            [C, B, H * v].
        """

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.logits is not None:
                self.logits.note(q, k, scale=scale, window=window)
            return causal_attention(q, k, v, scale=scale, window=window, sinks_H=sinks_H)

        if self.cp == 1:
            return attention(q_CBHd, k_SBGd, v_SBGv)
        piece = q_CBHd.shape[0] // 2
        outputs = []
        for index, q in zip((self.rank, 2 * self.cp - 1 - self.rank), q_CBHd.chunk(2), strict=True):
            end = (index + 1) * piece
            first = max(0, end - piece - window + 1) if window else 0
            outputs.append(attention(q, k_SBGd[first:end], v_SBGv[first:end]))
        return torch.cat(outputs)
