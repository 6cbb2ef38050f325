"""DeepEP or HybridEP for a model's expert layers, after it has moved one batch right."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from moe.config.schema import RunConfig
from moe.layer.dispatch_check import check_dispatcher
from moe.layer.dispatch_expert_tensor import ExpertTensorDispatcher
from moe.layer.dispatch_fused import ExchangeSizes, FusedDispatcher
from moe.layer.fused_library import FUSED, build_carrier, import_library, require_gpu
from moe.model.moe_adapter import MoEAdapter
from moe.ranks import on_every_rank


def require_fused_dispatcher(config: RunConfig, device: torch.device) -> None:
    """Whether the library that the config asks for, if any, is here and can run; collective over the job.

    Args:
        config: the run's.
        device: of this rank.

    Raises:
        InputError: the library is absent, too old or new, or has no kernels for this GPU.
    """
    name = config.parallel.dispatcher
    if name in FUSED:
        on_every_rank(lambda: _examine(name, device))


def use_fused_dispatcher(
    config: RunConfig,
    moe_layers: Mapping[int, MoEAdapter],
    group: dist.ProcessGroup,
    device: torch.device,
    undo: ExitStack,
) -> None:
    """Give it to the expert layers, if the config asks for one; collective over the job.

    All layers share one dispatcher: they take turns, and its buffers are large.

    Args:
        config: the run's.
        moe_layers: of this rank; a pipeline stage may have none.
        group: expert-parallel ranks.
        device: of this rank.
        undo: what frees the buffers when the job ends; it must be closed before the group is gone.

    Raises:
        InputError: the library cannot serve such a group or such rows.
        WrongDispatchError: it moved a batch otherwise than the plain all-to-all.
    """
    if config.parallel.dispatcher in FUSED:
        on_every_rank(lambda: _attach(config, moe_layers, group, device, undo))


def _examine(name: str, device: torch.device) -> None:
    import_library(name)
    require_gpu(name, device)


def _attach(
    config: RunConfig,
    moe_layers: Mapping[int, MoEAdapter],
    group: dist.ProcessGroup,
    device: torch.device,
    undo: ExitStack,
) -> None:
    if not moe_layers:  # then no rank of the group has any
        return
    _leave_new_memory_alone(undo)
    model, parallel = config.model, config.parallel
    tokens = config.train.micro_batch_size * config.data.seq_length // (parallel.tp * parallel.cp)
    sizes = ExchangeSizes(
        hidden_size=model.hidden_size,
        num_experts=model.num_experts,
        top_k=model.top_k,
        tokens_per_rank=tokens,
    )
    name = parallel.dispatcher
    carrier = build_carrier(name, import_library(name), group, sizes)
    undo.callback(carrier.close)
    dispatcher = FusedDispatcher(carrier, model.num_experts // group.size(), backend=config.engine.kernels)
    check_dispatcher(dispatcher, group, sizes, name=carrier.name, device=device)
    for adapter in moe_layers.values():
        outer = adapter.layer.dispatcher
        if isinstance(outer, ExpertTensorDispatcher):
            outer.inner = dispatcher
        else:
            adapter.layer.dispatcher = dispatcher


def _leave_new_memory_alone(undo: ExitStack) -> None:
    """No filling of new memory under deterministic algorithms: a library may be writing rows there.

    DeepEP 2 refuses it. No result changes, for nobody reads what was not written.
    """
    settings: Any = torch.utils.deterministic  # a module with properties, of which mypy sees none
    undo.callback(setattr, settings, "fill_uninitialized_memory", settings.fill_uninitialized_memory)
    settings.fill_uninitialized_memory = False
