"""Clock plans: the slowest stage stays, others just keep up, and the step is no longer than allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe.energy.clock_command import _clock_of, hold, make_plan_file
from moe.energy.clock_plan import Clocks, Stages, plan_clocks, step_of
from moe.errors import InputError
from moe.planner.layout import Layout

GRID = tuple(range(990, 1981, 15))


def pipeline(*busy_s: float, microbatches: int = 64, vpp: int = 1) -> Stages:
    pp = len(busy_s)
    return Stages(
        layout=Layout(gpus=pp, pp=pp, vpp=vpp),
        num_microbatches=microbatches,
        forward_s=tuple(time_s / 3 for time_s in busy_s),
        backward_s=tuple(time_s * 2 / 3 for time_s in busy_s),
        basis="planned: test",
    )


def clocks(compute_share: float = 1.0) -> Clocks:
    return Clocks(grid_mhz=GRID, compute_share=compute_share, busy_w=700, idle_w=120)


def test_balanced_pipeline_is_left_alone():
    plan = plan_clocks(pipeline(3, 3, 3, 3), clocks(), max_slowdown=0.05)
    assert {stage.clock_mhz for stage in plan.stages} == {GRID[-1]}
    assert (plan.energy_ratio, plan.slowed_step_s) == (1.0, plan.step_s)


@pytest.mark.parametrize("compute_share", [1.0, 0.6])
def test_stages_just_keep_up_with_the_slowest(compute_share):
    stages = pipeline(2.4, 3, 2.7, 2.4)
    plan = plan_clocks(stages, clocks(compute_share), max_slowdown=0.1)
    assert plan.stages[1].clock_mhz == GRID[-1]
    for stage in plan.stages:
        assert stage.slowed_s <= 3 * (1 + 1e-9)
        below = GRID[max(0, GRID.index(stage.clock_mhz) - 1)]
        if below < stage.clock_mhz:  # one step lower would be too slow
            assert stage.busy_s * clocks(compute_share).stretch(below) > 3
    assert plan.energy_ratio < 0.97


@pytest.mark.parametrize("max_slowdown", [0.0, 0.001, 0.01])
def test_step_played_out_is_no_longer_than_allowed(max_slowdown):
    stages = pipeline(2.0, 3, 2.7, 2.0, microbatches=8)
    plan = plan_clocks(stages, clocks(), max_slowdown=max_slowdown)
    assert plan.slowed_step_s <= plan.step_s * (1 + max_slowdown + 1e-9)
    stretches = [clocks().stretch(stage.clock_mhz) for stage in plan.stages]
    assert plan.slowed_step_s == step_of(stages, stretches)
    full = plan_clocks(stages, clocks(), max_slowdown=0.5)
    assert full.slowed_step_s > plan.step_s * 1.01  # all slack at once would have been too much


def test_interleaved_pipeline():
    plan = plan_clocks(pipeline(2.4, 3, vpp=2, microbatches=8), clocks(), max_slowdown=0.1)
    assert plan.stages[0].clock_mhz < plan.stages[1].clock_mhz == GRID[-1]


def test_one_stage_never_waits():
    with pytest.raises(InputError, match=r"parallel.pp=1"):
        plan_clocks(pipeline(3), clocks(), max_slowdown=0.1)


def write_plan(path: Path) -> Path:
    path.write_text(
        json.dumps(
            {
                "layout": {"gpus": 2, "pp": 2, "vpp": 1},
                "num_microbatches": 32,
                "microbatch_s_by_stage": [0.2, 0.3],
                "forward_share_by_stage": [0.3, 0.3],
            }
        )
    )
    return path


def test_plan_file_from_planned_and_from_measured_times(tmp_path: Path):
    options = {"gpu": "h100", "clocks": "990:1980:15", "compute_share": 1.0, "max_slowdown": "5%"}
    planned = make_plan_file(write_plan(tmp_path / "plan.json"), tmp_path / "clocks.json", **options)
    assert planned.basis.startswith("planned: ")
    written = json.loads((tmp_path / "clocks.json").read_text())
    assert (written["kind"], written["energy_is"]) == ("clock_plan", "predicted")
    assert [stage["clock_mhz"] for stage in written["stages"]] == [
        stage.clock_mhz for stage in planned.stages
    ]
    assert _clock_of(tmp_path / "clocks.json", 1) == 1980
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="measure_stage_times"):
        make_plan_file(tmp_path / "run", tmp_path / "clocks.json", **options)
    times = {
        "forward_s": [0.06, 0.09],
        "backward_s": [0.14, 0.21],
        "vpp": 1,
        "num_microbatches": 32,
        "device": "x",
    }
    (tmp_path / "run" / "stage_times.json").write_text(json.dumps(times))
    measured = make_plan_file(tmp_path / "run", tmp_path / "clocks.json", **options)
    assert measured.basis.startswith("measured on x: ")
    assert [one.clock_mhz for one in measured.stages] == [one.clock_mhz for one in planned.stages]


def test_what_is_no_plan_is_refused(tmp_path: Path):
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="is no clock plan"):
        hold(tmp_path / "other.json", 0, ["GPU-a"], allowed=True, note=print)
    with pytest.raises(InputError, match="has no stage times"):
        make_plan_file(
            tmp_path / "other.json",
            tmp_path / "o",
            gpu="h100",
            clocks="990,1980",
            compute_share=1,
            max_slowdown="1%",
        )
