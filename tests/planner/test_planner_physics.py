"""Terms of the plan that follow from what the engine does, against closed forms by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from moe.errors import InputError
from moe.planner.activations import Saved, layer_saved
from moe.planner.bytes_sent import bytes_sent
from moe.planner.collectives import Group, gather_s, tensor_group
from moe.planner.hardware_file import find_gpu
from moe.planner.imbalance import imbalance
from moe.planner.memory import memory_of_stages
from moe.planner.muon import momenta_bytes
from moe.planner.ops import Op, layer_ops
from moe.planner.plan import as_json, make_plan
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


@pytest.mark.parametrize(("precision", "gpu"), [("fp8", "h100"), ("mxfp8", "b200")])
def test_wide_products_into_the_activation_are_a_third_and_quantise_less(precision: str, gpu: str) -> None:
    job = job_of("qwen3-30b-a3b", f"model.expert_precision={precision}", gpu=gpu)
    narrow, mixed = ops_of(job), ops_of(replace(job, wide_into_activation=True))
    up, down = (mixed[f"experts {name}, wide"] for name in ("up", "down"))
    assert (up.flops, up.backward_flops) == (narrow["experts up"].flops, 0)
    assert (down.flops, down.backward_flops) == (0, narrow["experts down"].flops)
    assert up.precision == down.precision == "bf16"
    assert mixed["experts up"].precision == mixed["experts down"].precision == precision
    for total in ("flops", "backward_flops"):
        assert sum(getattr(op, total) for op in mixed.values()) == pytest.approx(
            sum(getattr(op, total) for op in narrow.values())
        )
    weights = [f"quantize weights of experts {name}" for name in ("up", "down")]
    assert [mixed[name].bytes for name in weights] == [0, narrow[weights[1]].bytes]
    assert [mixed[name].backward_bytes for name in weights] == [narrow[weights[0]].backward_bytes, 0]
    rows = narrow["quantize experts up"].bytes - mixed["quantize experts up"].bytes
    assert (
        rows == narrow["quantize experts down"].backward_bytes - mixed["quantize experts down"].backward_bytes
    )
    assert rows > 0


def test_transformer_engine_has_no_wide_products_into_the_activation() -> None:
    options = ("model.expert_precision=fp8", "model.expert_wide_into_activation=true")
    with pytest.raises(InputError, match=r"expert_wide_into_activation=.*plan\.kernels=te_fused.*; use "):
        job_of("qwen3-30b-a3b", *options, "plan.kernels=te_fused")


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
    eager = job_of("qwen3-30b-a3b")
    job = replace(eager, plan=te_plan(eager))  # whose AdamW is fused: no update exceeds the backward pass
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


def test_clamped_experts_keep_two_copies_unless_they_are_computed_again() -> None:
    """Gate and up as they came and as they were clamped; recomputed, the clamps are launched again."""
    job = job_of("gpt-oss-120b", "plan.kernels=te", gpus=64)
    again = replace(job, recompute=("moe_act",))
    unbiased = replace(job, shape=replace(job.shape, expert_bias=False))
    rows = 4096 * 4 * imbalance(job)
    saved, plain, kept = (layer_saved(one, dense=False).experts for one in (job, unbiased, again))
    assert saved - plain == pytest.approx(rows * 2 * 2880 * 2)
    assert kept == pytest.approx(plain - rows * 2880 * 2)
    assert ops_of(job)["clamp"].part == "moe_act"
    assert ops_of(job)["expert biases"].part == "moe"


@pytest.mark.parametrize("dispatcher", ["alltoall", "deepep", "hybridep"])
def test_8_bit_rows_are_padded_by_the_dispatcher_or_by_copies(dispatcher: str) -> None:
    job = job_of("qwen3-30b-a3b", "plan.kernels=te", f"plan.dispatcher={dispatcher}", "plan.precision=fp8")
    wide = replace(job, precision="bf16", expert_precision="bf16")
    fused = replace(job, plan=job.plan.model_copy(update={"kernels": "te_fused"}))
    assert not {"pad"} & {*ops_of(wide), *ops_of(fused)}
    assert ("pad" in ops_of(job)) == (dispatcher != "hybridep")
    if dispatcher != "hybridep":  # rows and outputs, each read and written
        assert ops_of(job)["pad"].bytes == 4 * 4096 * 8 * 2048 * 2
        assert ops_of(job)["pad"].part == "moe", "recomputed with the experts"


def test_each_expert_has_half_a_tile_too_many() -> None:
    """16 experts on a rank; a dense model is one expert of all rows, which fill their tiles."""
    job = job_of("qwen3-30b-a3b")
    up = ops_of(job)["experts up"]
    assert up.flops == 2 * (4096 * 8 + 16 * 127 / 2) * 2048 * 2 * 768
    assert up.backward_flops == 2 * up.flops
    dense = replace(job, shape=replace(job.shape, num_experts=1, top_k=1), layout=replace(job.layout, ep=1))
    assert ops_of(dense)["experts up"].flops == 2 * 4096 * 2048 * 2 * 768


@pytest.mark.parametrize(("tokens", "with_rows"), [(64, 16), (1, 8)])
def test_few_rows_take_a_tile_for_each_expert_that_has_some(tokens: int, with_rows: int) -> None:
    few = replace(job_of("qwen3-30b-a3b"), seq_length=tokens, micro_batch=1)
    assert ops_of(few)["experts up"].flops == 2 * with_rows * 128 * 2048 * 2 * 768


def test_biases_of_outputs_are_added_apart_where_experts_have_some() -> None:
    job = job_of("gpt-oss-120b", "plan.kernels=te", gpus=64)
    plain = replace(job, shape=replace(job.shape, attention=replace(job.shape.attention, out_bias=False)))
    with_bias, without = ops_of(job)["residuals"], ops_of(plain)["residuals"]
    assert with_bias.bytes - without.bytes == 2 * 4096 * 2880 * 2
    assert with_bias.backward_bytes - without.backward_bytes == 4096 * 2880 * 2


def test_transformer_engine_keeps_contiguous_values_and_no_projection() -> None:
    """Unless norms of heads do; 8-bit operands once, or by rows and by columns; the output stays wide."""
    ours = job_of("qwen3-30b-a3b", "model.attention.qk_norm=none")
    te = replace(ours, plan=te_plan(ours))
    q, k = 4096 * 32 * 128, 4096 * 4 * 128
    saved = [layer_saved(job, dense=False).attention for job in (ours, te)]
    assert saved[0] - saved[1] == 2 * (q + k)
    assert layer_saved(replace(te, precision="fp8"), dense=False).attention == saved[1]
    in_8_bits = replace(te, plan=te.plan.model_copy(update={"fp8_attention": True}))
    assert saved[1] - layer_saved(in_8_bits, dense=False).attention == q + 2 * k
    twice, once = (
        layer_saved(replace(job, precision="mxfp8"), dense=False).attention for job in (in_8_bits, te)
    )
    assert twice - once == pytest.approx((q + 2 * k) / 16)
    latent = replace(job_of("deepseek-v3-671b", gpus=64), recompute=())
    up = [layer_saved(job, dense=False).attention for job in (latent, replace(latent, plan=te_plan(latent)))]
    assert up[0] - up[1] == 4096 * 128 * 128 * 2


def test_8_bit_weights_have_one_copy_where_products_take_columns() -> None:
    """Embedding and head stay wide; Hopper keeps a copy by columns, too, as much as 16 bits."""
    overrides = ("plan.kernels=te", "plan.precision=fp8")
    h100, b200 = (
        memory_of_stages(job_of("qwen3-30b-a3b", *overrides, gpu=gpu))[0] for gpu in ("h100", "b200")
    )
    ends = 2 * 151936 * 2048
    numbers = h100.weights / 2
    assert b200.weights == pytest.approx(numbers - ends + 2 * ends)
    quantised = [
        ops_of(job_of("qwen3-30b-a3b", *overrides, gpu=gpu))["quantize qkv"].bytes for gpu in ("h100", "b200")
    ]
    assert quantised[0] - quantised[1] == 4096 * 2048


def test_python_has_no_lead_when_experts_are_counted() -> None:
    """Rows of experts are read on the host in each layer: 64 experts are launched one by one."""
    slow = replace(find_gpu("h100"), launch_s=100e-6)
    unfused = ("plan.kernels=te", "plan.cuda_graph=partial", "parallel.ep=2")
    job = replace(job_of("qwen3-30b-a3b", *unfused), gpu=slow)
    others = {"cuda_graph": "full"}, {"overlap_ep": True}
    waits = step_time(job).spent.launch_s
    assert waits > 0
    forward_s = sum(op.launches for op in layer_ops(job, dense=False) if op.of_experts) * slow.launch_s
    busy_s = sum(forward_time(op, slow).total_s for op in layer_ops(job, dense=False) if op.of_experts)
    layers = 48 * job.num_microbatches
    assert waits >= (forward_s - 1.1 * busy_s - step_time(job).expert_exchange_s / layers / 2) * layers > 0
    for other in others:
        assert step_time(replace(job, plan=job.plan.model_copy(update=other))).spent.launch_s < waits
    quick = replace(job, gpu=replace(slow, launch_s=1e-9))
    assert step_time(quick).spent.launch_s == 0


def test_a_layout_that_does_not_fit_is_planned_and_says_what_is_short() -> None:
    small = job_of("qwen3-30b-a3b", "parallel.ep=1")
    values = as_json(make_plan(small, 1))
    assert not values["fits"]
    short = values["short"]
    assert short["short_gib"] == pytest.approx(short["needed_gib"] - short["gpu_gib"])
    assert short["short_gib"] == pytest.approx(values["short_bytes"] / 2**30)
    assert len(short["largest_gib"]) == 3
    assert set(values) == set(as_json(make_plan(job_of("qwen3-30b-a3b"), 1)))
    assert values["step_s"] > 0 and values["memory_gib_worst_rank"] > 79
    assert as_json(make_plan(replace(small, gpu=find_gpu("gb300")), 1))["short"] is None
