"""DeepSpeed's own configuration and its process-wide switches, from the config of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime import compiler

from moe.config.schema import RunConfig


def settings(config: RunConfig, *, num_microbatches: int) -> dict[str, Any]:
    """What other programs keep in ds_config.json.

    Precision is not in it: parameters come in the dtype that they train in, bf16 beside the router's fp32,
    and DeepSpeed's bf16 switch would cast them all. Left off, gradients are reduced in fp32, as by Megatron.
    """
    engine = config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": num_microbatches,
        "gradient_clipping": config.optim.clip_grad_norm,
        "zero_optimization": zero,
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,  # its Adam for the CPU is compiled at the first start
        "steps_per_print": 2**62,  # our console prints
    }


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Keep DeepSpeed from starting a C++ compiler or torch's, as long as it is open.

    Over gloo it would build a shared-memory all-reduce on every machine, and fail where there is no compiler.
    Its first backward imports Muon, whose functions are decorated with torch.compile, even for AdamW.
    """
    own_compile = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer
    finally:
        compiler.compile = own_compile
    # Read by everything that would build an op. Asking for it would start compilers to probe the machine.
    before = vars(deepspeed.ops).get("__compatible_ops__")
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    try:
        yield
    finally:
        del deepspeed.ops.__compatible_ops__
        if before is not None:
            deepspeed.ops.__compatible_ops__ = before
