"""What DeepSpeed does not do, or does wrongly without a word, never starts; its private names are there."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from zero_runs import PRELOAD, Task, config_of, train, zero

from moe.engine.deepspeed_names import KNOWN_VERSION, NAMES, require_attributes, require_names
from moe.errors import InputError
from moe.train.run import make_engine


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


def test_private_names_of_deepspeed_still_mean_what_we_rely_on() -> None:
    """What they mean, beside that they exist: moe/engine/deepspeed_names.py sees to that at every start."""
    import inspect

    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        assert isinstance(getattr(groups, name), dict)
        assert isinstance(getattr(groups, f"{name}_RANKS"), dict)
    assert "_AutoEPMoELayer" in inspect.getsource(DeepSpeedEngine._configure_distributed_model)
    assert 'family == "autoep_expert"' in inspect.getsource(DeepSpeedEngine._resolve_zero3_param_placement)
    assert "__compatible_ops__" in inspect.getsource(inspect.getmodule(__import__("deepspeed.ops").ops))
    assert Init.param_id == 0
    assert DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ == ([0],)


def test_missing_names_are_listed_before_start() -> None:
    require_names()
    with pytest.raises(InputError) as refused:
        require_names([*NAMES, "deepspeed.utils.groups:_NO_SUCH_GROUP", "deepspeed.no_such_module:name"])
    assert str(refused.value) == (
        f"engine.name=deepspeed: DeepSpeed {version('deepspeed')} lacks "
        "deepspeed.utils.groups:_NO_SUCH_GROUP, deepspeed.no_such_module:name. DeepSpeed 0.19.8 is known to "
        "work: pip install deepspeed==0.19.8, or use engine.name=megatron"
    )


def test_import_that_fails_is_told_as_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "hjson", None)
        for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
            patch.delitem(sys.modules, name)
        with pytest.raises(InputError, match=r"is installed but cannot be imported: .*hjson"):
            require_names()
    (tmp_path / "needy_module.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="cannot be imported: No module named 'no_such_library'"):
        require_names(["needy_module:name"])


@pytest.mark.parametrize("name", ["deepspeed.runtime.zero.muon.no_such_module", "no_such_package.module"])
def test_module_that_is_only_found_can_be_missing(name: str) -> None:
    with pytest.raises(InputError, match=rf"lacks {name}\."):
        require_names([*NAMES, name])


def test_an_engine_without_its_names_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero import stage3

    monkeypatch.delattr(stage3, "defragment")
    with pytest.raises(InputError, match=r"lacks deepspeed\.runtime\.zero\.stage3:defragment\."):
        make_engine(config_of(zero(1), 1))


def test_missing_attributes_of_zero_are_listed() -> None:
    with pytest.raises(InputError) as refused:
        require_attributes(object(), SimpleNamespace(ds_tensor=0, ds_numel=0), zero_stage=3)
    lacking = "object.fp32_partitioned_groups_flat, object.grad_position, object.persistent_parameters, "
    assert f"lacks {lacking}ds_zero_partition_rank of parameters. DeepSpeed 0.19.8" in str(refused.value)


def test_the_pinned_version_is_the_one_that_is_known_to_work() -> None:
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    assert f"deepspeed=={KNOWN_VERSION}" in pins
