"""ZeRO for a model whose parameters have two dtypes: a bf16 model keeps its routers in fp32.

DeepSpeed 0.19 expects one. ZeRO-3 puts the weights of all ranks' shares into one buffer, and refuses a second
dtype; with weights in the host's memory it does not refuse but rounds them to the first dtype. Both places
are replaced while ZeRO-3 starts. ZeRO-1 and 2 take all gradients for those of the first dtype, the router's,
and would add up those of many micro-batches in bf16. Each parameter group must be of one dtype
(deepspeed_optimizer.py), and each dtype's groups neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor


class Buffers:
    """One flat buffer after another, each of its own dtype, read like one tensor."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self.buffers = buffers

    def narrow(self, _dim: int, start: int, length: int) -> Tensor:
        """Elements [start, start + length), which lie in one of the buffers."""
        for buffer in self.buffers:
            if start + length <= len(buffer):
                return buffer[start : start + length]
            start -= len(buffer)
        raise ValueError(f"{length} elements do not lie in one of the buffers of {self.buffers}")


@contextmanager
def two_dtypes() -> Iterator[None]:
    """While ZeRO-3 starts: one buffer for each dtype."""
    defragment = stage3.defragment
    host_memory = DeepSpeedZeroOptimizer_Stage3._create_param_groups_fp16_flat_cpu_memory

    def defragment_each(tensors: list[Tensor]) -> Buffers:
        return Buffers(
            [defragment(list(run)) for _, run in groupby(tensors, key=lambda tensor: tensor.dtype)]
        )

    def host_memory_of_each(optimizer: Any) -> None:
        for group in optimizer.trainable_param_groups:
            parameters = group["params"]
            elements = sum(parameter.partition_numel() for parameter in parameters)
            memory = torch.empty(elements, dtype=parameters[0].ds_tensor.dtype)
            optimizer.param_groups_fp16_flat_cpu_memory.append(get_accelerator().pin_memory(memory))

    stage3.defragment = defragment_each
    DeepSpeedZeroOptimizer_Stage3._create_param_groups_fp16_flat_cpu_memory = host_memory_of_each
    try:
        yield
    finally:
        stage3.defragment = defragment
        DeepSpeedZeroOptimizer_Stage3._create_param_groups_fp16_flat_cpu_memory = host_memory


def sum_in_fp32(optimizer: Any, *, zero_stage: int) -> None:
    """Add up the micro-batches of a bf16 model in fp32, as DeepSpeed does for a model all in bf16.

    Args:
        optimizer: ZeRO's, before its first backward. ZeRO-3 adds up in fp32 by itself.
        zero_stage: 1, 2 or 3.
    """
    if zero_stage == 1:
        optimizer.use_grad_accum_attribute = True
    elif zero_stage == 2:
        # One fp32 buffer for each group's share. Without it, sums in the host's memory are of the parameters'
        # dtype: over 32 micro-batches they were wrong by 1.5 % of a gradient's largest element.
        optimizer._use_compact_grad_partition_buffer = lambda _group_idx: True
