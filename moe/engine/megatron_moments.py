"""Main parameters and moments of the Megatron engine as checkpoints see them: parts of whole tensors.

A data-parallel rank has an arbitrary flat share of them. To write them, the first rank of each data-parallel
group lays those of the group together in the memory of its host, slice by slice: the weights' main replicas
are on it, so it is the one that writes. megatron-core 0.16.1 and 0.19.2 gather whole buckets on every GPU:
4 bytes times (2 + 1/dp) times a bucket, which may be all experts of a stage. That is far more than a GPU in
training has left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from moe.optim.muon import MuonAdamW

_STATES = ("param", "exp_avg", "exp_avg_sq")
# "Efficient" makes Megatron expect the gathered state on the first data-parallel rank only.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
# 256 MiB of fp32, and NCCL's copy of them: little beside what training leaves free on a GPU, and long enough
# for the full speed of a link, of which each of a thousand ranks still sends 256 KiB.
_ELEMENTS_AT_ONCE = 1 << 26


def create_moments(part: DistributedOptimizer) -> list[dict[str, Tensor]]:
    """Make the state that the first step would make, for Megatron loads into what exists.

    Returns:
        That of each parameter of AdamW.
    """
    inner = part.optimizer
    of_muon = _of_muon(inner)
    adam = []
    for group in inner.param_groups:
        for main in group["params"]:
            inner.state[main] = {"exp_avg": torch.zeros_like(main)}
            if main not in of_muon:
                inner.state[main]["exp_avg_sq"] = torch.zeros_like(main)
                adam.append(inner.state[main])
    return adam


def _of_muon(inner: torch.optim.Optimizer) -> set[Tensor]:
    """Slices that Muon moves."""
    if not isinstance(inner, MuonAdamW):
        return set()
    return {piece.main for bucket in inner.buckets for piece in bucket.pieces}


def sharded_moments(
    part: DistributedOptimizer, model_state: dict[str, Any], *, is_loading: bool
) -> dict[int, dict[str, Any]]:
    """Main parameters and moments as parts of whole tensors, by parameter; collective.

    Args:
        part: Of the optimizer.
        model_state: Sharded state of all chunks, whose layout they take.
        is_loading: Describe them only.

    Returns:
        Nothing on a rank that has none to write, for another of its data-parallel group does.
    """
    with _gathers_in_slices(part):
        sharded: dict[int, dict[str, Any]] | None = part.sharded_param_state_fully_reshardable(
            model_state, is_loading, metadata=_METADATA
        )
    if sharded is None:
        return {}
    parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
    for index, parameter in enumerate(parameters):
        if not _has(parameter, "exp_avg_sq"):
            del sharded[index]["exp_avg_sq"]
    return sharded


def _has(parameter: Tensor, state: str) -> bool:
    """Whether the optimizer keeps it; Muon has one moment, but Megatron wants a second of everything."""
    return state != "exp_avg_sq" or not hasattr(parameter, "has_one_moment")


# ---- gathering --------------------------------------------------------------------------------------------


@contextmanager
def _gathers_in_slices(part: DistributedOptimizer) -> Iterator[None]:
    """The optimizer's gathering of whole buckets is replaced by ours."""
    part.get_parameter_state_dp_zero = partial(whole_states, part)
    try:
        yield
    finally:
        del part.get_parameter_state_dp_zero  # that of its class appears again


def whole_states(
    part: DistributedOptimizer, *, empty_data: bool, return_on_all_ranks: bool, **_: Any
) -> dict[int, dict[Any, dict[str, Tensor]]] | None:
    """In the place of DistributedOptimizer.get_parameter_state_dp_zero; collective unless `empty_data`.

    Megatron's leaves out the padding of buckets, then looks for parameters where they lie with it: in 0.16.1
    the state of all after a padded bucket would be shifted. Here padding stays in.

    Args:
        part: Of the optimizer.
        empty_data: Zeros on every rank, into which a checkpoint is read.
        return_on_all_ranks: Asked for with empty data, and only then.

    Returns:
        By buffer, dtype and state a flat fp32 tensor in host memory, where a parameter lies as in the buffer.
        None on all ranks of the data-parallel group but the first, unless the data are empty.
    """
    assert return_on_all_ranks == empty_data
    has_result = empty_data or part.data_parallel_group.rank() == 0
    result = {}
    for index, (buffer, by_dtype) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        ((dtype, ranges),) = by_dtype.items()
        whole = {state: torch.zeros(buffer.numel) for state in _STATES} if has_result else {}
        result[index] = {dtype: whole}
        if not empty_data:
            for bucket, held in zip(buffer.buckets, ranges, strict=True):
                _gather_bucket(part, bucket, held["param_map"], whole)
    return result if has_result else None


def _gather_bucket(
    part: DistributedOptimizer,
    bucket: Any,
    held: Mapping[Tensor, Mapping[str, Any]],
    whole: Mapping[str, Tensor],
) -> None:
    """All states of a bucket, of which this rank has `held`, into `whole`, which is empty but on one rank."""
    numel = bucket.grad_data.numel()
    states = [name for name in _STATES if any(_has(parameter, name) for parameter in bucket.params_list)]
    for name in states:
        pieces = [
            (places["gbuf_local"].start, part._get_main_param_and_optimizer_states(parameter)[name])
            for parameter, places in held.items()
            if _has(parameter, name)
        ]
        target = whole[name][bucket.offset : bucket.offset + numel] if whole else None
        share = _Share(numel // part.data_parallel_group.size(), bucket.grad_data.device, pieces)
        _gather_shares(share, target, part.data_parallel_group)


@dataclass(frozen=True)
class _Share:
    """What a rank has of a state of a bucket; zeros where no piece is.

    Attributes:
        numel: Of the share, as on every rank.
        device: Of the pieces.
        pieces: Place of the first element in the share, and flat values.
    """

    numel: int
    device: torch.device
    pieces: Sequence[tuple[int, Tensor]]

    @torch.no_grad()
    def slice(self, first: int, last: int) -> Tensor:
        """A copy of some elements."""
        values = torch.zeros(last - first, device=self.device)
        for start, piece in self.pieces:
            begin, end = max(first, start), min(last, start + piece.numel())
            if begin < end:
                values[begin - first : end - first] = piece[begin - start : end - start]
        return values


def _gather_shares(share: _Share, target: Tensor | None, group: dist.ProcessGroup) -> None:
    """Lay the shares of all ranks one after another; collective if there is more than one rank.

    Args:
        share: Of this rank.
        target: All shares long; on the first rank of the group, and only there.
        group: In the order of shares.
    """
    ranks = group.size()
    step = max(1, _ELEMENTS_AT_ONCE // ranks)
    for first in range(0, share.numel, step):
        own = share.slice(first, min(first + step, share.numel))
        slices = own[None]
        if ranks > 1:
            # All get what one needs: a gather to one would have NCCL keep buffers for each of its peers.
            slices = own.new_empty(ranks, len(own))
            dist.all_gather(list(slices), own, group=group)
        if target is not None:
            for rank, values in enumerate(slices):
                start = rank * share.numel + first
                target[start : start + len(values)] = values
