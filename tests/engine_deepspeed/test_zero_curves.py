"""ZeRO-1, 2 and 3 in every layout walk the curve of one rank under Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tensors import tensors
from ranks_pool import RankPool
from zero_runs import LAYOUTS, PRELOAD, Task, assert_same_curve, trained, zero

FAST = {(1, "dp2"), (2, "ep2"), (3, "tp2 ep2")}
GPT_OSS = (
    "model.expert_bias=true",
    "model.router.logit_bias=true",
    "model.attention.sinks=true",
    "model.attention.qkv_bias=true",
    "model.attention.output_bias=true",
    "model.attention.sliding_window=4",
    "model.tie_embeddings=true",
)
MLA = (
    "model.attention.kind=mla",
    "model.attention.q_lora_rank=10",
    "model.attention.kv_lora_rank=12",
    "model.attention.qk_nope_head_dim=8",
    "model.attention.qk_rope_head_dim=4",
    "model.attention.v_head_dim=6",
)


@pytest.fixture(scope="module")
def pool(start_ranks: Any) -> RankPool:
    ranks: RankPool = start_ranks(4, init_process_group=False, preload=PRELOAD)
    return ranks


@pytest.fixture(scope="module")
def expected(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One rank under Megatron, and its checkpoint."""
    folder = tmp_path_factory.mktemp("megatron")
    return trained(pool, 1, Task(save_to=folder)), folder / "step_00000005"


@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        pytest.param(stage, layout, marks=() if (stage, layout) in FAST else pytest.mark.slow)
        for stage in (1, 2, 3)
        for layout in LAYOUTS
    ],
)
def test_curve_and_final_weights_are_those_of_one_rank(
    pool: RankPool, expected: tuple[dict[str, Any], Path], tmp_path: Path, stage: int, layout: str
) -> None:
    curve, checkpoint = expected
    num_ranks, overrides = LAYOUTS[layout]
    found = trained(pool, num_ranks, Task((*overrides, *zero(stage)), save_to=tmp_path))
    assert_same_curve(found, curve, rel=1e-5)
    written, wanted = tensors(tmp_path / "step_00000005"), tensors(checkpoint)
    assert written.keys() == wanted.keys()
    for key, tensor in wanted.items():
        difference = float((written[key] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30))
        assert difference < 1e-4, (key, difference)
        assert written[key].dtype == tensor.dtype


@pytest.mark.parametrize("stage", [2, pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    "layout",
    ["ep2", pytest.param("dp2", marks=pytest.mark.slow), pytest.param("tp2 ep2", marks=pytest.mark.slow)],
)
def test_a_rank_whose_experts_get_no_token_does_not_hang(pool: RankPool, stage: int, layout: str) -> None:
    off = ("model.router.bias_update_rate=0",)
    curve = trained(pool, 1, Task(off, steps=2, starved=True))
    assert all(sum(row[4:]) == 0 < sum(row[:4]) for step in curve["counts"] for row in step)
    num_ranks, overrides = LAYOUTS[layout]
    found = trained(pool, num_ranks, Task((*overrides, *off, *zero(stage)), steps=2, starved=True))
    assert_same_curve(found, curve, rel=1e-5)


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
@pytest.mark.parametrize(
    "model", [GPT_OSS, pytest.param(MLA, marks=pytest.mark.slow)], ids=["gpt-oss", "mla"]
)
def test_other_architectures(pool: RankPool, stage: int, model: tuple[str, ...]) -> None:
    curve = trained(pool, 1, Task(model, steps=3))
    found = trained(pool, 2, Task((*model, "parallel.tp=2", *zero(stage)), steps=3))
    assert_same_curve(found, curve, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_twenty_steps(pool: RankPool, stage: int, layout: str) -> None:
    curve = trained(pool, 1, Task(steps=20))
    num_ranks, overrides = LAYOUTS[layout]
    found = trained(pool, num_ranks, Task((*overrides, *zero(stage)), steps=20))
    assert found["loss"] == pytest.approx(curve["loss"], rel=1e-3)


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("layout", ["ep2", pytest.param("tp2", marks=pytest.mark.slow)])
def test_bf16_is_megatrons(pool: RankPool, tmp_path: Path, stage: int, layout: str) -> None:
    num_ranks, overrides = LAYOUTS[layout]
    narrow = (*overrides, "train.precision=bf16")
    curve = trained(pool, num_ranks, Task(narrow))
    found = trained(pool, num_ranks, Task((*narrow, *zero(stage)), save_to=tmp_path))
    assert found["loss"] == pytest.approx(curve["loss"], rel=1e-4)
    assert found["grad_norm"] == pytest.approx(curve["grad_norm"], rel=2e-3)
    saved = tensors(tmp_path / "step_00000005")
    expert = "decoder.layers.1.mlp.layer.experts.w_down_eDF"
    assert saved[expert].dtype == torch.bfloat16
    assert torch.equal(saved[f"optimizer.state.param.{expert}"].bfloat16(), saved[expert])
    assert saved["decoder.layers.1.mlp.layer.router.weight_ED"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_offload_changes_nothing(pool: RankPool, stage: int, offload: str, precision: str) -> None:
    same = ("parallel.ep=2", *zero(stage), f"train.precision={precision}")
    resident = trained(pool, 2, Task(same))
    offloaded = trained(pool, 2, Task((*same, f"engine.offload={offload}")))
    # Offloaded, ZeRO-3 rounds the norm to fp32: a clipped weight may be rounded to its other bf16 neighbour.
    assert_same_curve(offloaded, resident, rel=1e-5 if precision == "fp32" else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(pool: RankPool, stage: int, recompute: str) -> None:
    curve = trained(pool, 1, Task(steps=3))
    again = ("parallel.ep=2", *zero(stage), f"train.recompute={recompute}")
    assert_same_curve(trained(pool, 2, Task(again, steps=3)), curve, rel=1e-5)
