"""The state of ZeRO's optimizers as whole tensors, in the checkpoint format of the Megatron engine.

ZeRO cuts each parameter's fp32 copy and moments into ranges, one on each rank of the group that shares the
parameter. To save, the ranges are gathered on one of those ranks, a different one for each parameter, so that
no rank holds more than its share; to load, each rank reads the tensors whole and keeps its range. Keys,
shapes and global offsets are those of the model, so a checkpoint fits every layout, stage and engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor
from torch.nn import Parameter

from moe.engine.deepspeed_groups import is_expert

MOMENTS = ("exp_avg", "exp_avg_sq")
READ_AT_ONCE_BYTES = 1 << 30  # whole tensors that a rank holds while it loads


@dataclass(frozen=True)
class Range:
    """The part of a parameter that this rank updates: elements [start, start + length) in row-major order."""

    start: int
    length: int
    flat: Tensor | None  # fp32, in which ZeRO keeps such parts of many parameters; None where length is 0
    flat_start: int

    def of(self, flat: Tensor) -> Tensor:
        """This range in `flat` or in a tensor of moments beside it."""
        return flat.detach()[self.flat_start : self.flat_start + self.length]


def range_in_zero_1_and_2(optimizer: Any, parameter: Parameter) -> Range:
    """Where ZeRO-1/2 keeps this rank's part of a parameter, if it has one."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return Range(0, 0, None, 0)
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    part = mapping.lp_fragment_address
    return Range(part.start, part.numel, flat, mapping.hp_fragment_address.start)


def range_in_zero_3(optimizer: Any, parameter: Any) -> Range:
    """Where ZeRO-3 keeps this rank's part of a parameter; the last ranks' parts may be padding."""
    group, flat_start, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = parameter.ds_zero_partition_rank * padded
    length = max(0, min(padded, parameter.ds_numel - start))
    flat = optimizer.fp32_partitioned_groups_flat[group]
    return Range(start, length, flat if length else None, flat_start)


@dataclass(frozen=True)
class Template:
    """A parameter before DeepSpeed had it."""

    parameter: Parameter
    shape: tuple[int, ...]
    shard: Any  # ShardedTensor or ShardedTensorFactory
    group: dist.ProcessGroup  # the ranks that will share it


def templates_of(
    sharded_state: dict[str, Any], *, dp: dist.ProcessGroup, expert_dp: dist.ProcessGroup
) -> list[Template]:
    """Every parameter of a model, in the model's order.

    Args:
        sharded_state: moe.model.build.sharded_state of it.
        dp: ranks that hold the same dense parameters.
        expert_dp: ranks that hold the same experts.
    """
    shards = {id(shard.data): shard for shard in nested_values(sharded_state)}
    return [
        Template(shard.data, tuple(shard.data.shape), shard, expert_dp if is_expert(shard.data) else dp)
        for shard in shards.values()
        if isinstance(shard.data, Parameter)
    ]


@dataclass(frozen=True)
class Shared:
    """A parameter of the model, and how it is cut."""

    parameter: Parameter
    shape: tuple[int, ...]  # on this rank, before ZeRO took it
    template: Any  # ShardedTensor or ShardedTensorFactory: its key and its place in the whole tensor
    group: dist.ProcessGroup  # the ranks that share it
    range: Range
    lengths: tuple[int, ...]  # of the ranges of all ranks of the group

    @property
    def is_written_here(self) -> bool:
        """Whether this group writes it, not one of other tensor-parallel ranks that hold the same."""
        replica = self.template.replica_id
        return bool(is_main_replica((*replica[:-1], 0)))

    def as_shard(self, key: str, data: Tensor) -> Any:
        """`data` in the place of this parameter, as tensor `key` of a checkpoint, written by this rank."""
        changes: dict[str, Any] = {
            "key": key,
            "data": data,
            "replica_id": (*self.template.replica_id[:-1], 0),
        }
        if isinstance(self.template, ShardedTensor):
            changes["dtype"] = data.dtype
        return replace(self.template, **changes)


class ZeroState:
    """Saves and loads what a ZeRO optimizer holds."""

    def __init__(self, optimizer: Any, templates: Sequence[Template], *, zero_stage: int) -> None:
        """Find where ZeRO put each parameter; collective.

        Args:
            optimizer: DeepSpeed's.
            templates: of every parameter, taken from the model before DeepSpeed had it.
            zero_stage: 1, 2 or 3.
        """
        self.optimizer = optimizer
        self.zero_stage = zero_stage
        find = range_in_zero_3 if zero_stage == 3 else range_in_zero_1_and_2
        ranges = [find(optimizer, template.parameter) for template in templates]
        self.parameters = [
            Shared(template.parameter, template.shape, template.shard, template.group, own, lengths)
            for template, own, lengths in zip(templates, ranges, _lengths(templates, ranges), strict=True)
        ]

    def shards(self) -> dict[str, Any]:
        """Weights, fp32 weights and moments, each on one rank; collective."""
        state: dict[str, Any] = {}
        for index, shared in enumerate(self.parameters):
            whole_3n = self._gather(index, shared) if shared.is_written_here else None
            if whole_3n is None:
                continue
            key = shared.template.key
            main = whole_3n[0].view(shared.shape)
            state[key] = shared.as_shard(key, main.to(shared.parameter.dtype))
            for name, values in zip(("param", *MOMENTS), whole_3n, strict=True):
                state_key = f"optimizer.state.{name}.{key}"
                state[state_key] = shared.as_shard(state_key, values.view(shared.shape))
        return state

    def load(self, directory: Path, step: int) -> None:
        """Read fp32 weights and moments; collective.

        Args:
            directory: of shards that were verified.
            step: updates that the moments have seen, for Adam's bias correction.
        """
        names = tuple(f"optimizer.state.{name}." for name in ("param", *MOMENTS))
        for shared, tensors in self._read(directory, names):
            for part, tensor in zip(self._parts(shared), tensors, strict=True):
                _copy_range(part, tensor, shared.range)
        for shared in self.parameters:
            if shared.range.flat is not None:
                self._moments(shared.range.flat)["step"].fill_(step)
        self._spread()

    def load_weights(self, directory: Path) -> None:
        """Read weights of whatever precision; moments stay as they are; collective."""
        for shared, (tensor,) in self._read(directory, ("",)):
            _copy_range(self._parts(shared)[0], tensor, shared.range)
        self._spread()

    # ---- what ZeRO holds ----------------------------------------------------------------------------------

    def _moments(self, flat: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a flat tensor; as AdamW makes it at its first step, if that is still to come."""
        state: dict[str, Tensor] = self.optimizer.optimizer.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state |= {name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS}
        return state

    def _parts(self, shared: Shared) -> list[Tensor]:
        """This rank's range of the fp32 weights and of both moments."""
        own = shared.range
        if own.flat is None:
            return [torch.empty(0)] * (1 + len(MOMENTS))
        moments = self._moments(own.flat)
        return [own.of(flat) for flat in (own.flat, *(moments[name] for name in MOMENTS))]

    def _gather(self, index: int, shared: Shared) -> Tensor | None:
        """[3, elements]: fp32 weights and moments on the CPU of one rank of the group, None elsewhere."""
        holders = [rank for rank, length in enumerate(shared.lengths) if length]
        keeper = holders[index % len(holders)]
        is_keeper = shared.group.rank() == keeper
        parts_3n = torch.stack(self._parts(shared))
        if len(holders) == 1:
            return parts_3n.cpu() if is_keeper else None
        padded_3n = torch.zeros(len(parts_3n), max(shared.lengths), device=_device_of(shared.group))
        padded_3n[:, : parts_3n.shape[1]] = parts_3n
        received = [torch.empty_like(padded_3n) for _ in shared.lengths] if is_keeper else None
        dist.gather(padded_3n, received, group=shared.group, group_dst=keeper)
        if received is None:
            return None
        # A rank's range follows that of the rank before it.
        parts = [part[:, :n].cpu() for part, n in zip(received, shared.lengths, strict=True)]
        return torch.cat(parts, dim=1)

    def _spread(self) -> None:
        """Make the weights that the model computes with from the fp32 ones; collective."""
        if self.zero_stage < 3:
            self.optimizer.update_lp_params()
            return
        for shared in self.parameters:
            ours = shared.parameter.ds_tensor.data  # type: ignore[attr-defined]
            _copy_range(ours[: shared.range.length], self._parts(shared)[0], None)
        for parameter in self.optimizer.persistent_parameters:  # small ones, which are kept whole
            parameter.partition()
        if self.optimizer.persistent_parameters:
            self.optimizer.persistent_parameters[0].all_gather(self.optimizer.persistent_parameters)

    # ---- files --------------------------------------------------------------------------------------------

    def _read(self, directory: Path, prefixes: tuple[str, ...]) -> Iterator[tuple[Shared, list[Tensor]]]:
        """Each parameter that has a range here with its tensors `prefix + key`, whole, fp32, on the CPU."""
        for chunk in _chunks(self.parameters, len(prefixes)):
            wanted = {
                f"{prefix}{shared.template.key}": shared.as_shard(
                    f"{prefix}{shared.template.key}", torch.empty(shared.shape)
                )
                for shared in chunk
                if shared.range.length
                for prefix in prefixes
            }
            # A tensor is read by every rank that needs it, which Megatron's check would refuse.
            loaded = dist_checkpointing.load(wanted, str(directory), validate_access_integrity=False)
            for shared in chunk:
                if shared.range.length:
                    yield shared, [loaded[f"{prefix}{shared.template.key}"] for prefix in prefixes]


def _lengths(templates: Sequence[Template], ranges: Sequence[Range]) -> Iterator[tuple[int, ...]]:
    """For each parameter the lengths of all ranges; collective."""
    tables: dict[dist.ProcessGroup, list[list[int]]] = {}
    own = [part.length for part in ranges]
    for group in dict.fromkeys(template.group for template in templates):
        tables[group] = [[] for _ in range(group.size())]
        dist.all_gather_object(tables[group], own, group=group)
    for index, template in enumerate(templates):
        yield tuple(table[index] for table in tables[template.group])


def _chunks(parameters: Sequence[Shared], copies: int) -> Iterator[list[Shared]]:
    """Neighbours whose whole tensors fit into READ_AT_ONCE_BYTES; the same on every rank."""
    totals = accumulate(4 * copies * sum(shared.lengths) for shared in parameters)
    chunks: dict[int, list[Shared]] = {}
    for shared, total in zip(parameters, totals, strict=True):
        chunks.setdefault(total // READ_AT_ONCE_BYTES, []).append(shared)
    yield from chunks.values()


def _copy_range(target: Tensor, source: Tensor, part: Range | None) -> None:
    flat = source.flatten()
    target.copy_(flat if part is None else flat[part.start : part.start + part.length])


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the group's backend takes tensors from."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
