"""Terms of the plan that follow from what the engine does, against closed forms by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from moe.planner.activations import Saved, layer_saved
from moe.planner.bytes_sent import bytes_sent
from moe.planner.collectives import Group, gather_s, tensor_group
from moe.planner.hardware_file import find_gpu
from moe.planner.memory import memory_of_stages
from moe.planner.muon import momenta_bytes
from moe.planner.ops import Op, layer_ops
from moe.planner.roofline import forward_time
from moe.planner.settings import Job, PlanSection, load_plan_config, make_job
from moe.planner.stages import stages_of
from moe.planner.step import step_time

CONFIGS = Path(__file__).parents[2] / "configs"
ONE_STAGE = ("parallel.pp=1", "parallel.vpp=1", "parallel.stage_layers=[]")


def job_of(recipe: str, *overrides: str, gpus: int = 8, gpu: str = "h100") -> Job:
    config = load_plan_config(CONFIGS / f"{recipe}.yaml", (*ONE_STAGE, *overrides))
    return make_job(config, gpus, find_gpu(gpu))


def ops_of(job: Job) -> dict[str, Op]:
    return {op.name: op for op in layer_ops(job, dense=False)}


def layer_bytes(job: Job, *, dense: bool = False) -> float:
    saved = layer_saved(job, dense=dense)
    return sum(getattr(saved, field.name) for field in fields(saved))


@pytest.mark.parametrize(("precision", "gpu"), [("fp8", "h100"), ("mxfp8", "b200")])
def test_weights_of_8_bit_experts_are_quantised_in_every_pass(precision: str, gpu: str) -> None:
    job = job_of("qwen3-30b-a3b", f"model.expert_precision={precision}", gpu=gpu)
    up = 128 / 8 * 2048 * 2 * 768
    quantised = ops_of(job)["quantize weights of experts up"]
    assert quantised.bytes == quantised.backward_bytes == pytest.approx(up * (2 + 1 + 1 / 32))
    assert quantised.part == "moe", "recomputed with the experts"
    theirs = replace(job, plan=te_plan(job))
    assert "quantize weights of experts up" not in ops_of(theirs), "its weights stay quantised over a step"


def test_only_wide_experts_add_to_gradient_buffers() -> None:
    """A gradient in bf16 is written and read, 4 bytes, before 8 in fp32 are read and written."""
    job = job_of("qwen3-30b-a3b")
    te = ops_of(replace(job, plan=te_plan(job)))
    ours, narrow = ops_of(job), replace(job, expert_precision="fp8")
    assert ours["experts up"].backward_bytes == te["experts up"].backward_bytes
    weight = 2048 * (32 + 2 * 4) * 128
    assert ours["qkv"].backward_bytes - te["qkv"].backward_bytes == pytest.approx(4 * weight)
    in_te = ops_of(replace(narrow, plan=te_plan(narrow)))["experts up"].backward_bytes
    up = 128 / 8 * 2048 * 2 * 768
    assert ops_of(narrow)["experts up"].backward_bytes - in_te == pytest.approx(4 * up)
    held = (memory_of_stages(one)[0].workspace for one in (narrow, job))
    experts = 128 / 8 * 3 * 2048 * 768
    assert next(held) - next(held) == pytest.approx(experts * (2 + 1 + 1 / 32))


def te_plan(job: Job) -> PlanSection:
    return job.plan.model_copy(update={"kernels": "te"})


@pytest.mark.parametrize("recipe", ["qwen3-30b-a3b", "deepseek-v3-671b", "gpt-oss-120b"])
@pytest.mark.parametrize("recompute", [("core_attn", "mla_up_proj"), ("full",)])
def test_what_is_computed_again_is_there_beside_what_was_saved(
    recipe: str, recompute: tuple[Any, ...]
) -> None:
    """A whole layer, or its attention and then its experts."""
    job = replace(job_of(recipe, gpus=64), recompute=recompute)
    saved, whole = (layer_saved(one, dense=False) for one in (job, replace(job, recompute=())))
    again = [getattr(whole, field.name) - getattr(saved, field.name) for field in fields(Saved)]
    workspace = memory_of_stages(job)[0].workspace
    assert workspace >= (sum(again) if "full" in recompute else whole.attention - saved.attention) > 0


def test_full_recomputation_adds_one_layer_less_its_input() -> None:
    job = job_of("qwen3-30b-a3b")
    full = replace(job, recompute=("full",))
    more = memory_of_stages(full)[0].workspace - memory_of_stages(job)[0].workspace
    assert more == pytest.approx(layer_bytes(job) - layer_bytes(full))


def test_keys_and_values_of_all_positions_are_on_each_rank_of_a_context() -> None:
    """Qwen3: 4 groups of 128, 32 heads; two pieces of the output are joined."""
    one, two = (job_of("qwen3-30b-a3b", f"parallel.cp={cp}", "parallel.ep=1") for cp in (1, 2))
    longer = replace(two, seq_length=2 * two.seq_length)  # as many tokens a rank
    more = layer_saved(longer, dense=False).attention - layer_saved(one, dense=False).attention
    q, kv = 32 * 128, 2 * 4 * 128
    assert longer.tokens == one.tokens
    assert more == pytest.approx(one.tokens * 2 * (2 * kv - kv / 2 + q))
    rings = (replace(job, plan=te_plan(job)) for job in (one, longer))
    assert len({layer_saved(ring, dense=False).attention for ring in rings}) == 1


def test_latent_attention_projects_all_positions_on_each_rank() -> None:
    one, two = (job_of("deepseek-v3-671b", f"parallel.cp={cp}", gpus=64) for cp in (1, 2))
    longer = replace(two, seq_length=2 * two.seq_length)
    ups, queries = ([ops_of(job)[name].flops for job in (one, longer)] for name in ("kv up", "q up"))
    assert ups[1] == 2 * ups[0]
    assert queries[1] == queries[0]


def test_products_in_fp32_use_no_tensor_cores() -> None:
    gpu = find_gpu("h100")
    flops = 1e15
    times = [forward_time(Op(name="", kind="gemm", flops=flops, precision=p), gpu) for p in ("fp32", "bf16")]
    assert times[0].math_s / times[1].math_s == pytest.approx(989 / 67)
    ops = ops_of(job_of("gpt-oss-120b", gpus=64))
    assert {ops["attention"].precision, ops["router"].precision} == {"fp32"}


def test_only_layers_with_a_window_make_attention_weights() -> None:
    window = ("model.attention.sliding_window=128", "model.attention.full_attention_every=2")
    job = job_of("qwen3-30b-a3b", *window)
    by_kind = {op.kind: op for op in layer_ops(job, dense=False) if op.name == "attention"}
    fused, made = by_kind["attention"], by_kind["gemm"]
    products = 4096 * 4096 * 32 * 256 * 2
    assert fused.flops == pytest.approx(0.5 * products / 2)
    assert made.flops == pytest.approx(0.5 * products)
    saved = [layer_saved(one, dense=False).attention for one in (job_of("qwen3-30b-a3b"), job)]
    all_made = layer_saved(job_of("qwen3-30b-a3b", window[0]), dense=False).attention
    assert saved[1] == pytest.approx((saved[0] + all_made) / 2)


def test_split_experts_sort_and_combine_the_rows_of_all_slices() -> None:
    whole, split = (
        ops_of(job_of("gpt-oss-120b", "parallel.ep=2", f"parallel.etp={n}", gpus=64)) for n in (1, 2)
    )
    for name in ("permute", "combine"):
        assert split[name].bytes == 2 * whole[name].bytes
    # Twice the rows of the output, as many numbers of gate and up.
    outputs = 4096 * 4 * 2880 * 2
    assert split["expert biases"].backward_bytes - whole["expert biases"].backward_bytes == outputs


def test_products_hide_neither_keys_nor_losses() -> None:
    """Of the five exchanges of each layer half is hidden by two ranks, whatever travels beside them."""
    layout = ("parallel.tp=2", "parallel.cp=2", "parallel.ep=1")
    on, off = (job_of("qwen3-30b-a3b", *layout, f"plan.overlap_tp={flag}") for flag in ("true", "false"))
    hidden_s = step_time(off).spent.tp_s - step_time(on).spent.tp_s
    stream_s = gather_s(on.tokens * 2048 * 2, tensor_group(on.layout, on.gpu), on.gpu)
    assert hidden_s == pytest.approx(0.5 * 5 * stream_s * 48 * on.num_microbatches)


def test_zero_2_reduces_gradients_in_every_micro_batch() -> None:
    jobs = [replace(job_of("olmoe-7b-a1b", "parallel.pp=1"), zero=zero) for zero in (1, 2)]
    numbers = sum(stage.gradients for stage in memory_of_stages(replace(jobs[0], zero=0))) / 4
    more = bytes_sent(jobs[1]).data - bytes_sent(jobs[0]).data
    m = jobs[0].num_microbatches
    assert m > 1
    assert more == pytest.approx((m - 1) * 4 * numbers * 7 / 8)


def test_zero_3_holds_a_gathered_layer() -> None:
    two, three = (memory_of_stages(replace(job_of("olmoe-7b-a1b"), zero=zero))[0] for zero in (2, 3))
    experts, attention = 64 * 3 * 2048 * 1024, 4 * 2048 * 2048
    others = 2048 * 64 + 4 * 2048  # router and norms
    assert three.weights - two.weights / 8 == pytest.approx(2 * (experts + attention + others), rel=1e-3)


def test_momenta_that_nobody_shares_are_not_gathered() -> None:
    job = replace(job_of("olmoe-7b-a1b"), muon=True, zero=0)
    assert momenta_bytes(job, stages_of(job)[0]) == (0, 0)
    assert bytes_sent(job).data == bytes_sent(replace(job, muon=False)).data


def test_gradients_held_twice_take_time() -> None:
    """Those of norms and routers on tensor-parallel ranks; of a tied embedding on two stages."""
    job = job_of("qwen3-30b-a3b", "parallel.tp=2", gpus=16)
    tied = replace(job, layout=replace(job.layout, pp=2), shape=replace(job.shape, tied=True))
    apart = replace(tied, shape=replace(tied.shape, tied=False))
    embedding_s = step_time(tied).spent.pp_s - step_time(apart).spent.pp_s
    whole = 151936 * 2048 / 2 * 4
    pair = Group(size=2, near=1)
    assert embedding_s == pytest.approx(2 * gather_s(whole, pair, job.gpu))
