"""What is computed again in the backward pass instead of being kept (train.recompute)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recompute_settings(recompute: str) -> dict[str, Any]:
    """Megatron's words for train.recompute; what is selective is `recomputed`'s, not Megatron's."""
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": []}
    return {}


def recomputed(
    config: TransformerConfig,
    compute: Callable[..., Tensor],
    *inputs: Tensor,
    again: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """compute(*inputs); under selective recompute only the inputs are kept for the backward pass.

    Args:
        config: says whether.
        compute: draws no random numbers.
        inputs: what it takes.
        again: makes what is open while it computes again, as often as there are backward passes.
    """
    if config.recompute_granularity != "selective" or not torch.is_grad_enabled():
        return compute(*inputs)
    output: Tensor = checkpoint(
        compute,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), again()),
    )
    return output


def is_counted(config: TransformerConfig) -> bool:
    """Whether a forward pass in training is the one that counts: a recomputed layer passes twice.

    Megatron's full recompute runs the first pass without gradients and the second with them.
    """
    is_full: bool = config.recompute_granularity == "full"
    return torch.is_grad_enabled() != is_full
