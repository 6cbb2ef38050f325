"""The optimizer of the Megatron engine: main parameters in fp32, sharded over data-parallel ranks."""

from __future__ import annotations

import torch
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
from moe.model.build import DTYPES


def build_optimizer(config: RunConfig, ddp: DistributedDataParallel) -> MegatronOptimizer:
    """AdamW over main parameters in fp32, sharded over data-parallel ranks."""
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
    return get_megatron_optimizer(settings, [ddp], overrides, use_gloo_process_groups=False)


def _does_not_decay(parameter: Tensor, name: str) -> bool:
    is_bias = name.endswith((".bias", ".b_gate_up_eG", ".b_down_eD"))
    return (is_bias or parameter.dim() == 1) and ".router." not in name


def create_moments(optimizer: DistributedOptimizer) -> list[dict[str, Tensor]]:
    """Make the state that torch.optim.AdamW makes at its first step: Megatron loads into what exists."""
    adam = optimizer.optimizer
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.state[parameter] = {
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return [adam.state[parameter] for group in adam.param_groups for parameter in group["params"]]
