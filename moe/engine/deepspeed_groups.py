"""Tells DeepSpeed which ranks share what: Megatron's process groups as its `mpu`, and the experts' own.

DeepSpeed averages a gradient over all data-parallel ranks unless it knows that a parameter is an expert's.
It learns that from three things, none of them documented: marks on the parameter, an entry in its table of
expert groups, and a module of a class of its own, which switches the code for experts on. Without the last,
ZeRO-3 trains wrongly and says nothing. tests/engine_deepspeed covers each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from deepspeed.comm import comm
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init, register_external_parameter
from deepspeed.utils import groups as deepspeed_groups
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from moe.model.moe_adapter import MoEAdapter

EXPERT_GROUP = "joulemoe_experts"


class MegatronGroups:
    """What DeepSpeed 0.19 asks of an `mpu`, answered by Megatron. There is no pipeline."""

    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_pipeline_model_parallel_world_size = staticmethod(
        parallel_state.get_pipeline_model_parallel_world_size
    )
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the data-parallel group."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())


class HasExperts(AutoEPMoELayer):  # type: ignore[misc]
    """An empty module whose class makes DeepSpeed look for experts; the experts are where they are."""

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)  # the base class would build a layer
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        """Would make groups; `expert_groups` has given ours."""


class WithExperts(nn.Module):
    """A model beside the module that says it has experts."""

    def __init__(self, model: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.model = model
        self.has_experts = HasExperts(num_experts)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The model's."""
        output: Tensor = self.model(*args, **kwargs)
        return output


def is_expert(parameter: Tensor) -> bool:
    """Whether a parameter is a routed expert's, by Megatron's mark (moe.model.moe_adapter)."""
    return not getattr(parameter, "allreduce", True)


def mark_experts(model: nn.Module) -> None:
    """Name the experts' group on each of their parameters, for ZeRO-1/2 and for ZeRO-3."""
    for parameter in model.parameters():
        if is_expert(parameter):
            parameter.group_name = EXPERT_GROUP  # type: ignore[attr-defined]
            parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
            parameter.ds_zero_partition_group_name = EXPERT_GROUP  # type: ignore[attr-defined]


@contextmanager
def expert_groups(groups: ProcessGroupCollection) -> Iterator[None]:
    """Enter Megatron's expert groups into DeepSpeed's tables; DeepSpeed's own would not fold over tp."""
    tables = (
        (deepspeed_groups._EXPERT_PARALLEL_GROUP, groups.ep),
        (deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP, groups.expt_dp),
        (deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS, dist.get_process_group_ranks(groups.ep)),
        (deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, dist.get_process_group_ranks(groups.expt_dp)),
    )
    for table, entry in tables:
        table[EXPERT_GROUP] = entry
    try:
        yield
    finally:
        # A later engine of this process has other groups, and ZeRO-3 compares its numbers of modules and
        # parameters among ranks, of which some may be new.
        deepspeed_groups._release_process_group_references()
        comm.cdb = None
        Init.param_id = 0
        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


def sum_over_tensor_parallel_ranks(model: nn.Module, tp: dist.ProcessGroup) -> None:
    """Add up gradients that each tensor-parallel rank has for its part of the sequence only.

    Megatron does it when a step's gradients are complete; DeepSpeed does not do it at all. Here it happens
    as autograd delivers each gradient, so that ZeRO may scatter it at once.
    """
    if tp.size() == 1:
        return

    def summed(gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total, group=tp)
        return total

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(summed)


def declare_distant_parameters(model: GPTModel) -> None:
    """Tell ZeRO-3 of parameters that are used outside of the forward and backward of the module they are in.

    ZeRO-3 gathers a module's parameters when it is called, and again when the gradient of a tensor that it
    returned arrives. A module that is never called, or returns no plain tensors, would compute with nothing.
    """
    for module in model.modules():
        if isinstance(module, MoEAdapter):  # its router returns a dataclass
            _declare(module, module.layer.router)
        if isinstance(getattr(module, "sinks", None), nn.Module):  # attention reads the vector
            _declare(module, module.sinks)
    if model.share_embeddings_and_output_weights:
        _declare(model.output_layer, model.embedding.word_embeddings)


def _declare(user: nn.Module, owner: nn.Module) -> None:
    for parameter in owner.parameters():
        register_external_parameter(user, parameter)
