"""What DeepSpeed does not do, or does wrongly without a word, never starts; its private names are there."""

from __future__ import annotations

import os
from typing import Any

import pytest
from zero_runs import PRELOAD, Task, config_of, train, zero

from moe.errors import InputError


@pytest.mark.parametrize(
    ("overrides", "world_size", "words"),
    [
        (("parallel.pp=2",), 2, "parallel.pp=2 with engine.name=deepspeed"),
        (("parallel.cp=2",), 2, "parallel.cp=2 with engine.name=deepspeed"),
        (("parallel.pp=2", "parallel.vpp=1"), 2, "use engine.name=megatron"),
        (("parallel.overlap_grad_reduce=true",), 1, "parallel.overlap_grad_reduce=true with engine"),
        (("optim.name=muon",), 1, "optim.name=muon is not available with engine.name=deepspeed"),
        (("optim.qk_clip=100",), 1, "optim.qk_clip=100 is not available with engine.name=deepspeed"),
        (("engine.offload=all",), 1, "use engine.offload=optimizer or engine.zero_stage=3"),
        # Stage 0 starts Adam at its second step in bf16; fp16 needs a loss scale that would miss our own
        # losses. Neither has a key.
        (("engine.zero_stage=0",), 1, "engine.zero_stage"),
        (("train.precision=fp16",), 1, "train.precision"),
    ],
)
def test_refused_by_name(overrides: tuple[str, ...], world_size: int, words: str) -> None:
    with pytest.raises(InputError) as refused:
        config_of((*zero(1), *overrides), world_size)
    assert words in str(refused.value)


@pytest.mark.parametrize("override", ["engine.zero_stage=3", "engine.offload=optimizer"])
def test_megatron_refuses_what_it_does_not_read(override: str) -> None:
    with pytest.raises(InputError) as refused:
        config_of((override,), 1)
    assert f"{override} has no meaning with engine.name=megatron; use engine.name=deepspeed" in str(
        refused.value
    )


def train_without_compilers() -> None:
    """As a job of one rank that no launcher started."""
    import subprocess
    from unittest.mock import patch

    from torch._inductor import compile_fx  # Megatron imports it
    from torch.utils import cpp_extension

    alone = {name: value for name, value in os.environ.items() if "RANK" not in name}
    with (
        patch.object(subprocess.Popen, "__init__", side_effect=AssertionError("a program was started")),
        patch.object(cpp_extension, "_jit_compile", side_effect=AssertionError("C++ is compiled")),
        patch.object(compile_fx, "compile_fx", side_effect=AssertionError("a graph is compiled")),
        patch.dict(os.environ, alone, clear=True),
    ):
        train(Task(zero(2), steps=1))
    from deepspeed.runtime.zero.muon import original_muon

    source = original_muon.muon_update.__code__.co_filename
    assert source == original_muon.__file__, f"Muon was given to torch.compile: {source}"


def test_start_and_a_step_compile_nothing(start_ranks: Any) -> None:
    start_ranks(1, init_process_group=False, preload=PRELOAD).run(train_without_compilers)


def test_private_names_of_deepspeed_that_we_rely_on() -> None:
    """Each is used in moe/engine/deepspeed_*.py; another version of DeepSpeed may lack one."""
    import inspect

    from deepspeed.comm import comm
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.runtime import compiler
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import groups

    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        assert isinstance(getattr(groups, name), dict)
        assert isinstance(getattr(groups, f"{name}_RANKS"), dict)
    assert callable(groups._release_process_group_references)
    assert issubclass(AutoEPMoELayer, object)
    assert "_AutoEPMoELayer" in inspect.getsource(DeepSpeedEngine._configure_distributed_model)
    assert 'family == "autoep_expert"' in inspect.getsource(DeepSpeedEngine._resolve_zero3_param_placement)
    assert "__compatible_ops__" in inspect.getsource(inspect.getmodule(__import__("deepspeed.ops").ops))
    assert callable(compiler.compile)
    assert callable(compiler.dummy_decorator)
    assert hasattr(comm, "cdb")
    assert Init.param_id == 0
    assert DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ == ([0],)
    assert callable(DeepSpeedZeroOptimizer.update_lp_params)
    for name in ("grad_position", "fp32_partitioned_groups_flat", "persistent_parameters"):
        assert f"self.{name}" in inspect.getsource(DeepSpeedZeroOptimizer_Stage3)
    assert "self.single_partition_of_fp32_groups" in inspect.getsource(DeepSpeedZeroOptimizer)
