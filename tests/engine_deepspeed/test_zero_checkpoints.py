"""Checkpoints of the DeepSpeed engine: exact, and one format with Megatron's across stages and layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_tensors import assert_bit_equal
from ranks_pool import RankPool
from zero_runs import LAYOUTS, PRELOAD, Task, trained, zero

MEGATRON = {
    "one rank": (1, ()),
    "pp2": (2, ("parallel.pp=2",)),
    "tp2 ep4": (4, ("parallel.tp=2", "parallel.ep=4")),
}
JOBS = {
    **{f"megatron {name}": job for name, job in MEGATRON.items()},
    **{
        f"zero{stage} {name}": (num_ranks, (*overrides, *zero(stage)))
        for stage in (1, 2, 3)
        for name, (num_ranks, overrides) in LAYOUTS.items()
    },
    "zero1 one rank": (1, zero(1)),
    "zero3 one rank": (1, zero(3)),
}
FAST = [
    ("zero3 tp2 ep2", "megatron one rank"),
    ("megatron pp2", "zero3 ep2"),
    ("zero1 dp2", "zero2 tp2 ep2"),
]
SLOW = [
    ("megatron one rank", "zero1 dp2"),
    ("megatron tp2 ep4", "zero2 tp2"),
    ("megatron pp2", "zero1 tp2 ep2"),
    ("zero1 one rank", "zero3 dp2"),
    ("zero1 tp2", "zero1 ep2"),
    ("zero1 ep2", "zero3 tp2"),
    ("zero1 tp2 ep2", "megatron tp2 ep4"),
    ("zero2 dp2", "zero3 one rank"),
    ("zero2 ep2", "megatron pp2"),
    ("zero2 tp2", "zero1 ep2"),
    ("zero2 tp2 ep2", "zero2 ep2"),
    ("zero3 one rank", "zero1 one rank"),
    ("zero3 dp2", "zero2 ep2"),
    ("zero3 ep2", "zero3 tp2 ep2"),
    ("zero3 tp2", "megatron pp2"),
    ("zero3 tp2 ep2", "zero1 dp2"),
]


@pytest.fixture(scope="module")
def pool(start_ranks: Any) -> RankPool:
    ranks: RankPool = start_ranks(4, init_process_group=False, preload=PRELOAD)
    return ranks


@pytest.mark.parametrize(
    ("stage", "layout", "precision"),
    [
        (1, "dp2", "bf16"),
        (3, "ep2", "fp32"),
        *(
            pytest.param(stage, layout, precision, marks=pytest.mark.slow)
            for stage in (1, 2, 3)
            for layout in ("ep2", "tp2 ep2")
            for precision in ("fp32", "bf16")
        ),
    ],
)
def test_resume_in_the_same_layout_is_bit_exact(
    pool: RankPool, tmp_path: Path, stage: int, layout: str, precision: str
) -> None:
    num_ranks, overrides = LAYOUTS[layout]
    same = (*overrides, *zero(stage), f"train.precision={precision}")
    straight = trained(pool, num_ranks, Task(same, steps=4, save_to=tmp_path / "straight"))
    trained(pool, num_ranks, Task(same, steps=2, save_to=tmp_path / "first"))
    half = tmp_path / "first" / "step_00000002"
    rest = Task(same, steps=2, steps_before=2, load_from=half, save_to=tmp_path / "second")
    resumed = trained(pool, num_ranks, rest)
    assert resumed["loss"] == straight["loss"][2:]
    assert resumed["grad_norm"] == straight["grad_norm"][2:]
    assert resumed["heldout"] == straight["heldout"]
    assert_bit_equal(tmp_path / "second" / "step_00000004", tmp_path / "straight" / "step_00000004")


@pytest.mark.parametrize(
    ("before", "after", "precision"),
    [
        *((before, after, "fp32") for before, after in FAST),
        *(
            pytest.param(before, after, precision, marks=pytest.mark.slow)
            for before, after in (*FAST, *SLOW)
            for precision in ("fp32", "bf16")
            if (before, after) in SLOW or precision == "bf16"
        ),
    ],
)
def test_another_layout_stage_or_engine_changes_no_byte(
    pool: RankPool, tmp_path: Path, before: str, after: str, precision: str
) -> None:
    kind = f"train.precision={precision}"
    num_ranks, overrides = JOBS[before]
    trained(pool, num_ranks, Task((*overrides, kind), steps=3, save_to=tmp_path / "before"))
    written = tmp_path / "before" / "step_00000003"
    num_ranks, overrides = JOBS[after]
    again = Task((*overrides, kind), steps=0, steps_before=3, load_from=written, save_to=tmp_path / "after")
    trained(pool, num_ranks, again)
    assert_bit_equal(tmp_path / "after" / "step_00000003", written)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_megatron_run_goes_on_under_deepspeed(pool: RankPool, tmp_path: Path, stage: int) -> None:
    straight = trained(pool, 1, Task(steps=5))
    trained(pool, 1, Task(steps=2, save_to=tmp_path))
    half = tmp_path / "step_00000002"
    num_ranks, overrides = LAYOUTS["ep2"]
    rest = Task((*overrides, *zero(stage)), steps=3, steps_before=2, load_from=half)
    resumed = trained(pool, num_ranks, rest)
    assert resumed["loss"] == pytest.approx(straight["loss"][2:], rel=1e-5)
    assert resumed["grad_norm"] == pytest.approx(straight["grad_norm"][2:], rel=1e-4)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_new_run_starts_from_the_weights_of_another_precision(
    pool: RankPool, tmp_path: Path, stage: int
) -> None:
    trained(pool, 1, Task(("train.precision=bf16",), steps=2, save_to=tmp_path))
    start = Task(weights_from=tmp_path / "step_00000002", steps=2)
    expected = trained(pool, 1, start)
    num_ranks, overrides = LAYOUTS["tp2"]
    found = trained(
        pool, num_ranks, Task((*overrides, *zero(stage)), weights_from=start.weights_from, steps=2)
    )
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
