"""Muon in the Megatron engine: the curve, the weights and the moments of one rank in every layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_tensors import assert_bit_equal, tensors
from muon_runs import MLA, batches, config_of
from ranks_pool import RankPool

LAYOUTS = {
    "tp2": (2, ["parallel.tp=2"]),
    "ep2": (2, ["parallel.ep=2"]),
    "dp2": (2, []),
    "pp2": (2, ["parallel.pp=2"]),
    "dp4": (4, []),  # shares that end within matrices and within experts
    "tp2 ep4": (4, ["parallel.tp=2", "parallel.ep=4"]),
    "ep2 etp2": (4, ["parallel.ep=2", "parallel.etp=2"]),
    "pp2 ep2 overlap": (
        4,
        [
            "parallel.pp=2",
            "parallel.ep=2",
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true",
        ],
    ),
}


def train(
    overrides: list[str], steps: range, save_to: Path | None = None, load_from: Path | None = None
) -> list[tuple[float, float]]:
    """On one rank of a job: loss and gradient norm of each step."""
    from moe.checkpoint.save import save_checkpoint
    from moe.engine.megatron import MegatronEngine

    torch.set_num_threads(1)
    config = config_of(overrides, int(os.environ["WORLD_SIZE"]))
    engine = MegatronEngine(config)
    try:
        if load_from is not None:
            engine.load_shards(load_from, steps.start)
        results = [
            engine.train_step(batches(config, step, engine.dp_rank, engine.layout.dp), lr=1e-2)
            for step in steps
        ]
        if save_to is not None:
            save_checkpoint(engine, save_to, steps.stop, {}, keep=9)
        dist.barrier()
        return [(result.loss, result.grad_norm) for result in results]
    finally:
        engine.close()


@pytest.fixture(scope="module")
def pool(start_ranks: Any) -> RankPool:
    ranks: RankPool = start_ranks(4, init_process_group=False)
    return ranks


@pytest.fixture(scope="module")
def of_one_rank(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Curves and checkpoints of one rank, by model."""
    found = {}
    for name, model in (("gqa", []), ("mla", MLA)):
        folder = tmp_path_factory.mktemp(name)
        found[name] = pool.run(train, model, range(4), folder, num_ranks=1)[0], folder / "step_00000004"
    return found


FAST = {("gqa", "dp4"), ("gqa", "pp2 ep2 overlap"), ("mla", "tp2 ep4")}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(model, layout, marks=[] if (model, layout) in FAST else pytest.mark.slow)
        for model in ("gqa", "mla")
        for layout in LAYOUTS
    ],
)
def test_layout_gives_the_curve_and_the_state_of_one_rank(
    model: str, layout: str, pool: RankPool, of_one_rank: Any, tmp_path: Path
) -> None:
    num_ranks, overrides = LAYOUTS[layout]
    expected, checkpoint = of_one_rank[model]
    overrides = [*overrides, *(MLA if model == "mla" else ())]
    for curve in pool.run(train, overrides, range(4), tmp_path, num_ranks=num_ranks):
        for step, (found, wanted) in enumerate(zip(curve, expected, strict=True)):
            assert found == pytest.approx(wanted, rel=1e-4), step
    whole, ours = tensors(checkpoint), tensors(tmp_path / "step_00000004")
    assert ours.keys() == whole.keys()
    worst = {
        key: float((ours[key] - whole[key]).abs().max() / (whole[key].abs().max() + 1e-9)) for key in whole
    }
    assert {key: error for key, error in worst.items() if error > 1e-3} == {}


def test_matrices_have_one_moment_and_all_else_two(of_one_rank: Any) -> None:
    for _, checkpoint in of_one_rank.values():
        found = tensors(checkpoint)
        models = {key for key in found if not key.startswith("optimizer.") and not key.endswith("bias_E")}
        second = {key.removeprefix("optimizer.state.exp_avg_sq.") for key in found if ".exp_avg_sq." in key}
        adamw = {
            key
            for key in models
            if found[key].dim() == 1 or "embedding" in key or "output_layer" in key or ".router." in key
        }
        assert second == adamw
        assert {f"optimizer.state.exp_avg.{key}" for key in models} <= found.keys()


@pytest.mark.parametrize("model", ["gqa", pytest.param("mla", marks=pytest.mark.slow)])
def test_resume_is_bit_equal(model: str, pool: RankPool, tmp_path: Path) -> None:
    overrides = ["parallel.ep=2", *(MLA if model == "mla" else ["train.precision=bf16"])]
    whole = pool.run(train, overrides, range(4), tmp_path / "whole", num_ranks=2)[0]
    pool.run(train, overrides, range(2), tmp_path / "cut", num_ranks=2)
    rest = pool.run(
        train, overrides, range(2, 4), tmp_path / "cut", tmp_path / "cut/step_00000002", num_ranks=2
    )
    assert rest[0] == whole[2:]
    assert_bit_equal(tmp_path / "cut/step_00000004", tmp_path / "whole/step_00000004")


def test_another_layout_goes_on_from_the_same_state(pool: RankPool, of_one_rank: Any, tmp_path: Path) -> None:
    """Loaded by dp2 tp2 and written again, nothing differs in a byte."""
    checkpoint = of_one_rank["gqa"][1]
    pool.run(train, ["parallel.tp=2", "parallel.ep=2"], range(4, 4), tmp_path, checkpoint, num_ranks=4)
    assert_bit_equal(tmp_path / "step_00000004", checkpoint)
