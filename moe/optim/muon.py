"""Muon over parameters whose optimizer state is shared out flat over data-parallel ranks (ZeRO-1).

Moonlight's distributed Muon (arXiv 2502.16982, section 2.3): momentum is elementwise, so each rank keeps that
of its share. An update needs whole matrices: the momentum is gathered over data-parallel ranks, and over
tensor-parallel ones where they split the matrix; each rank orthogonalises those that its share touches and
keeps its own part. AdamW moves everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.optim.matrices import Matrices

# Bounds the memory of the iterations, and leaves matrices of any size enough work for a GPU.
_ELEMENTS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class Piece:
    """What this rank has of a parameter: a flat fp32 slice.

    Attributes:
        main: The slice, a parameter of the optimizer.
        first: Place of its first element in the parameter.
        offset: Place of its first element in this rank's share of the bucket.
        bucket_offset: Place of the parameter's first element in the bucket.
        matrices: In the parameter.
    """

    main: Tensor
    first: int
    offset: int
    bucket_offset: int
    matrices: Matrices


@dataclass(frozen=True)
class Bucket:
    """Parameters that lie one after another and are shared out in equal parts.

    Attributes:
        share_numel: Elements of a rank's share.
        group: Ranks that have the shares, in order.
        device: Of the memory.
        pieces: This rank's with matrices; none if its share has other parameters.
    """

    share_numel: int
    group: dist.ProcessGroup
    device: torch.device
    pieces: tuple[Piece, ...]


class MuonAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for all else, with the same learning rate and weight decay.

    Momentum is kept as `exp_avg`, the name that Megatron's checkpoints know.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        buckets: Sequence[Bucket],
        *,
        momentum: float,
        dtype: torch.dtype,
        tp_group: dist.ProcessGroup | None = None,
        **adamw: Any,
    ) -> None:
        """The same on every rank.

        Args:
            groups: Of all parameters, pieces of matrices among them.
            buckets: In an order that all ranks share; each has matrices on some rank.
            momentum: Share of the old momentum in the new one.
            dtype: To gather and orthogonalise in.
            tp_group: Ranks that split matrices.
            adamw: Arguments of torch.optim.AdamW.
        """
        self._adamw = torch.optim.AdamW([{"params": []}], **adamw)
        super().__init__([{"params": []}], self._adamw.defaults)
        # Not by add_param_group: slices of weights that are fp32 anyway are views, which it refuses.
        self.param_groups = self._adamw.param_groups = list(groups)
        self.state = self._adamw.state
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self.buckets = tuple(buckets)
        self.momentum = momentum
        self.dtype = dtype
        self.tp_group = tp_group

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; collective over the groups of all buckets and over tp."""
        assert closure is None, "the gradients are there already"
        pieces = [piece for bucket in self.buckets for piece in bucket.pieces]
        gradients = [piece.main.grad for piece in pieces]
        for piece in pieces:
            piece.main.grad = None  # AdamW leaves out what has no gradient
        self._adamw.step()
        for piece, gradient in zip(pieces, gradients, strict=True):
            piece.main.grad = gradient
        group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}
        for bucket in self.buckets:
            momenta = self._gathered_momenta(bucket)
            for piece in bucket.pieces:
                self._move(piece, momenta, group_of[piece.main])
            del momenta  # a bucket may be all experts of a stage: never two at once

    def _gathered_momenta(self, bucket: Bucket) -> Tensor:
        """Nesterov momenta of the whole bucket, flat."""
        share = torch.zeros(bucket.share_numel, dtype=self.dtype, device=bucket.device)
        for piece in bucket.pieces:
            gradient = piece.main.grad
            assert gradient is not None
            state = self.state[piece.main]
            if not state:
                state["exp_avg"] = torch.zeros_like(piece.main)
            momentum = state["exp_avg"].lerp_(gradient, 1 - self.momentum)
            end = piece.offset + piece.main.numel()
            share[piece.offset : end] = gradient.lerp(momentum, self.momentum)
        if bucket.group.size() == 1:
            return share
        whole = share.new_empty(bucket.share_numel * bucket.group.size())
        dist.all_gather_into_tensor(whole, share, group=bucket.group)
        return whole

    def _move(self, piece: Piece, momenta: Tensor, group: dict[str, Any]) -> None:
        """Weight decay and update; of experts only those that the piece touches are orthogonalised."""
        shape = piece.matrices.shape
        numel = math.prod(shape[-2:])
        begin, end = piece.first, piece.first + piece.main.numel()
        at_once = max(1, _ELEMENTS_AT_ONCE // numel)
        piece.main.mul_(1 - group["lr"] * group["weight_decay"])
        for first in range(begin // numel, -(-end // numel), at_once):
            last = min(first + at_once, -(-end // numel))
            start, stop = first * numel, last * numel
            x_bNM = momenta[piece.bucket_offset + start : piece.bucket_offset + stop].view(-1, *shape[-2:])
            update = piece.matrices.update(x_bNM, self.tp_group).flatten()
            own = slice(max(begin, start), min(end, stop))
            part = piece.main[own.start - begin : own.stop - begin]
            part.sub_(update[own.start - start : own.stop - start], alpha=group["lr"])
