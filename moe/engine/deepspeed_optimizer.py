"""AdamW in the parameter groups that ZeRO needs: apart by weight decay, by expert or not, and by dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe.config.schema import RunConfig
from moe.engine.deepspeed_groups import EXPERT_GROUP, is_expert
from moe.optim.decay import decays


def build_adamw(config: RunConfig, model: nn.Module) -> torch.optim.AdamW:
    """Torch's AdamW, of which ZeRO makes the sharded one.

    Args:
        config: the run's.
        model: this rank's, its experts marked.
    """
    optim = config.optim
    return torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay, fp32_first=config.engine.zero_stage < 3),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )


def parameter_groups(model: nn.Module, weight_decay: float, *, fp32_first: bool) -> list[dict[str, Any]]:
    """Groups of parameters that differ in nothing that ZeRO or AdamW treats by group.

    Args:
        model: names decide what decays.
        weight_decay: of matrices.
        fp32_first: DeepSpeed takes the dtype of the first parameter for that of all. ZeRO-1/2 reduce in it;
            ZeRO-3 casts to the dtype of communication only what differs from it.
    """
    groups: dict[tuple[bool, bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        is_narrow = parameter.dtype != torch.float32
        groups.setdefault(
            (is_narrow == fp32_first, is_expert(parameter), decays(name, parameter)), []
        ).append(parameter)
    return [
        {
            "params": groups[key],
            "weight_decay": weight_decay if key[2] else 0.0,
            "name": EXPERT_GROUP if key[1] else "dense",
            "moe": key[1],
        }
        for key in sorted(groups)
    ]
