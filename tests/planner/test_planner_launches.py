"""When the GPU waits for Python: layers whose host must learn how many rows experts have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe.planner.hardware_file import find_gpu
from moe.planner.ops import embedding_ops, head_ops, layer_ops
from moe.planner.settings import Job, load_plan_config, make_job
from moe.planner.step import step_time

RECIPE = Path(__file__).parents[2] / "configs" / "qwen3-30b-a3b.yaml"
ONE_STAGE = ("parallel.pp=1", "parallel.vpp=1", "parallel.stage_layers=[]")
LAYERS = 48


def job_of(*overrides: str, launch_s: float) -> Job:
    config = load_plan_config(RECIPE, (*ONE_STAGE, "plan.kernels=te", *overrides))
    return make_job(config, 8, replace(find_gpu("h100"), launch_s=launch_s))


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_a_step_that_python_limits_takes_its_time_and_no_more(overlap: str) -> None:
    """Python launches while the tensor-parallel ranks exchange, too."""
    job = job_of("parallel.tp=4", "parallel.ep=8", f"plan.overlap_tp={overlap}", launch_s=1e-3)
    ops = [*layer_ops(job, dense=False) * LAYERS, *embedding_ops(job), *head_ops(job)]
    launches = sum(op.launches + op.backward_launches for op in ops)
    time = step_time(job)
    assert time.spent.tp_s > 0
    assert time.microbatch_s[0] == pytest.approx(launches * 1e-3)


def test_a_dense_model_counts_no_rows() -> None:
    """One expert of all rows is launched ahead of a GPU that is busy with it; two must be counted."""
    job = job_of("parallel.ep=1", launch_s=2e-4)
    shape = replace(job.shape, num_experts=1, top_k=1, expert_hidden_size=64 * 768)
    assert step_time(replace(job, shape=shape)).spent.launch_s == 0
    assert step_time(replace(job, shape=replace(shape, num_experts=2))).spent.launch_s > 0


def test_experts_of_multi_token_prediction_are_counted_too() -> None:
    job = job_of("parallel.ep=2", "plan.cuda_graph=partial", launch_s=20e-6)
    one_more = replace(job, shape=replace(job.shape, mtp_layers=1))
    waits_s = step_time(job).spent.launch_s
    assert step_time(one_more).spent.launch_s == pytest.approx(waits_s * (LAYERS + 1) / LAYERS)
    assert waits_s > 0


def test_python_launches_beside_exposed_exchanges_only() -> None:
    """A third of what is hidden in the forward pass is no longer there to launch beside."""
    flags = ("true", "false")
    on, off = (job_of("parallel.tp=4", "parallel.ep=1", f"plan.overlap_tp={f}", launch_s=2e-4) for f in flags)
    shape = replace(on.shape, num_experts=2, top_k=1, expert_hidden_size=256 * 768)
    hidden, exposed = (step_time(replace(job, shape=shape)).spent for job in (on, off))
    assert exposed.launch_s > 0
    assert hidden.launch_s - exposed.launch_s == pytest.approx((exposed.tp_s - hidden.tp_s) / 3)
