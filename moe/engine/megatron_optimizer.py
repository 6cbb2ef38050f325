"""The optimizer of the Megatron engine: main parameters in fp32, sharded over data-parallel ranks.

megatron-core's own Muon needs a package beside it, refuses the distributed optimizer, and leaves the matrices
of experts to AdamW, for ours are one tensor. So its distributed optimizer gets ours (moe.optim) in the place
of AdamW: buffers, sharding, clipping and checkpoints stay Megatron's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    ParamWithNamePredicate,
    get_megatron_optimizer,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from moe.config.schema import RunConfig
from moe.engine.megatron_qk_clip import QkClip, Slice
from moe.model.build import DTYPES
from moe.optim.decay import decays
from moe.optim.matrices import Matrices, matrices_of
from moe.optim.muon import Bucket, MuonAdamW, Piece


def build_optimizer(
    config: RunConfig, ddps: Sequence[DistributedDataParallel]
) -> tuple[MegatronOptimizer, QkClip | None]:
    """AdamW or Muon over main parameters in fp32, sharded over dp; one for all chunks of a rank.

    Returns:
        The optimizer, and QK-clip where it acts after each step.
    """
    optim = config.optim
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad_norm,
        bf16=config.train.precision == "bf16",
        params_dtype=DTYPES[config.train.precision],
        use_distributed_optimizer=True,
    )
    # The router's fp32 weights are a group of their own: in a group with bf16 parameters, megatron-core
    # 0.16.1 confuses the order of the two kinds when it saves.
    overrides = {
        ParamKey(with_name_predicate=ParamWithNamePredicate("norms and biases", _does_not_decay)): (
            ParamGroupOverride(wd_mult=0.0)
        ),
        ParamKey(name="*.router.*"): ParamGroupOverride(wd_mult=1.0),
    }
    optimizer = get_megatron_optimizer(settings, list(ddps), overrides, use_gloo_process_groups=False)
    if optim.name == "muon":
        matrices = _all_matrices(config, ddps)
        for parameter in matrices:
            parameter.has_one_moment = True  # type: ignore[attr-defined]
        for part in parts_of(optimizer):
            part.optimizer = _muon(part, matrices, config)
    clip = None
    if optim.qk_clip > 0:
        dense, *_ = parts_of(optimizer)
        clip = QkClip(
            ddps,
            dict(_slices(dense)),
            attention=config.model.attention,
            tau=optim.qk_clip,
            dp_group=dense.data_parallel_group,
        )
        dense.optimizer.register_step_post_hook(clip)
    for part in parts_of(optimizer)[:-1]:
        # After its step each part gathers the weights of all its chunks, of other parts too (megatron-core
        # 0.16.1). The last part does it when all have stepped; before that it would be the same bytes again.
        part.model_chunks = []
    return optimizer, clip


def parts_of(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers that a chained one is made of: of dense parameters and of experts."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _does_not_decay(parameter: Tensor, name: str) -> bool:
    return not decays(name, parameter)


def _all_matrices(config: RunConfig, ddps: Sequence[DistributedDataParallel]) -> dict[Tensor, Matrices]:
    """The parameters that Muon moves."""
    named = (pair for ddp in ddps for pair in ddp.named_parameters())
    found = {parameter: matrices_of(name, parameter, config.model) for name, parameter in named}
    return {parameter: matrices for parameter, matrices in found.items() if matrices is not None}


def _muon(part: DistributedOptimizer, matrices: dict[Tensor, Matrices], config: RunConfig) -> MuonAdamW:
    """What takes the place of AdamW in a distributed optimizer, over the same shards."""
    optim = config.optim
    return MuonAdamW(
        part.optimizer.param_groups,
        list(_buckets(part, matrices)),
        momentum=optim.muon_momentum,
        dtype=DTYPES[config.train.precision],
        tp_group=_splitting_ranks(part),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )


def _splitting_ranks(part: DistributedOptimizer) -> dist.ProcessGroup:
    """The ranks that split its matrices; megatron-core 0.16 names those of dense ones for experts, too."""
    parameters = (parameter for buffer in part.buffers for parameter in buffer.param_index_map)
    of_experts = any(not getattr(parameter, "allreduce", True) for parameter in parameters)
    group = parallel_state.get_expert_tensor_parallel_group() if of_experts else part.tp_group
    assert isinstance(group, dist.ProcessGroup)
    return group


def _buckets(part: DistributedOptimizer, matrices: dict[Tensor, Matrices]) -> Iterator[Bucket]:
    """Megatron's buckets that have matrices on any rank, and this rank's pieces of them."""
    for buffer, by_dtype in zip(part.buffers, part.gbuf_ranges, strict=True):
        (ranges,) = by_dtype.values()
        for bucket, held in zip(buffer.buckets, ranges, strict=True):
            if matrices.keys() & set(bucket.params_list):
                yield Bucket(
                    share_numel=bucket.grad_data.numel() // part.data_parallel_group.size(),
                    group=part.data_parallel_group,
                    device=bucket.grad_data.device,
                    pieces=tuple(
                        Piece(
                            main=_main(part, parameter),
                            first=places["param"].start,
                            offset=places["gbuf_local"].start,
                            bucket_offset=buffer.param_index_map[parameter][0] - bucket.offset,
                            matrices=matrices[parameter],
                        )
                        for parameter, places in held["param_map"].items()
                        if parameter in matrices
                    ),
                )


def _slices(part: DistributedOptimizer) -> Iterator[tuple[Tensor, Slice]]:
    """Each parameter of which this rank has a slice."""
    for by_dtype in part.gbuf_ranges:
        for held in next(iter(by_dtype.values())):
            for parameter, places in held["param_map"].items():
                columns = parameter.shape[-1] if parameter.dim() > 1 else 1
                yield parameter, Slice(_main(part, parameter), places["param"].start, columns)


def _main(part: DistributedOptimizer, parameter: Tensor) -> Tensor:
    """This rank's fp32 slice of a parameter."""
    group, place = part.model_param_group_index_map[parameter]
    main: Tensor = part.optimizer.param_groups[group]["params"][place]
    return main
