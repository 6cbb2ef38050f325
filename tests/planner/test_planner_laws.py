"""What must hold for every plan: laws of monotony, floors and units, over random jobs."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.counts.shape import Attention, Shape
from moe.counts.stages import balanced_chunks
from moe.planner.campaign import best_interval_s, goodput
from moe.planner.collectives import Exchange, Group, exchange_bytes, expected_distinct, gather_s
from moe.planner.energy import step_energy
from moe.planner.hardware import GPUS
from moe.planner.layout import Layout
from moe.planner.memory import memory_of_stages
from moe.planner.plan import as_json, make_plan
from moe.planner.schedule import timeline
from moe.planner.settings import Job, PlanSection, check
from moe.planner.step import step_time

FAST = settings(max_examples=40, deadline=None, derandomize=True)
GQA = Attention(num_heads=32, num_groups=8, qk_dim=128, rope_dim=128, v_dim=128)
MLA = Attention(
    num_heads=32, num_groups=32, qk_dim=192, rope_dim=64, v_dim=128, q_lora_rank=1536, kv_lora_rank=512
)
SINKS = dataclasses.replace(GQA, sinks=True, window=128, full_every=2)


@st.composite
def jobs(draw: Any) -> Job:
    """A job that can be laid out, of any kind of model, GPU and assumption."""
    size = st.sampled_from([1, 2, 4, 8])
    two = st.sampled_from([1, 2])
    axes = {"tp": size, "pp": size, "ep": size, "vpp": two, "cp": two, "etp": two}
    layout = Layout(gpus=0, **{axis: draw(ranks) for axis, ranks in axes.items()})
    gpu = GPUS[draw(st.sampled_from(sorted(GPUS)))]
    gpus = 64 * layout.pp * draw(size)
    shape = Shape(
        num_layers=draw(st.integers(17, 40)),
        num_dense_layers=draw(st.integers(0, 3)),
        hidden_size=draw(st.sampled_from([1024, 4096])),
        ffn_hidden_size=8192,
        vocab_size=65536,
        num_experts=64,
        top_k=draw(st.sampled_from([2, 8])),
        expert_hidden_size=1024,
        shared_hidden_size=draw(st.sampled_from([0, 1024])),
        capacity_factor=draw(st.sampled_from([0.0, 1.0, 1.25])),
        attention=draw(st.sampled_from([GQA, MLA, SINKS])),
        expert_bias=draw(st.booleans()),
        mtp_layers=draw(st.sampled_from([0, 1])),
    )
    plan = PlanSection(
        routing=draw(st.sampled_from(["natural", "balanced"])),
        dispatcher=draw(st.sampled_from(["alltoall", "hierarchical", "deepep"])),
        kernels=draw(st.sampled_from(["ours", "te", "te_fused"])),
        cuda_graph=draw(st.sampled_from(["none", "partial", "full"])),
        overlap_ep=draw(st.booleans()),
        overlap_tp=draw(st.booleans()),
    )
    job = Job(
        zero=draw(st.sampled_from([0, 1, 2, 3])),
        overlap_grads=draw(st.booleans()),
        recompute=draw(st.sampled_from([(), ("full",), ("moe_act", "layernorm")])),
        muon=draw(st.booleans()),
        shape=shape,
        gpu=gpu,
        layout=dataclasses.replace(layout, gpus=gpus),
        seq_length=4096,
        global_batch=gpus * 4,
        micro_batch=draw(st.sampled_from([1, 2])),
        precision=draw(st.sampled_from(["bf16", "fp8"])),
        expert_precision=draw(st.sampled_from(sorted({"bf16", "fp8", "mxfp8"} & gpu.peak_flops.keys()))),
        plan=plan,
    )
    assert check(job) == []
    return job


@FAST
@given(jobs())
def test_overlap_never_slows_a_step_and_muon_never_speeds_it_up(job: Job) -> None:
    def seconds(*, overlap: bool, muon: bool) -> float:
        plan = job.plan.model_copy(update={"overlap_tp": overlap})
        return step_time(dataclasses.replace(job, plan=plan, muon=muon)).step_s

    assert seconds(overlap=True, muon=job.muon) <= seconds(overlap=False, muon=job.muon) * (1 + 1e-12)
    assert seconds(overlap=job.plan.overlap_tp, muon=True) >= seconds(overlap=job.plan.overlap_tp, muon=False)


def worst_bytes(job: Job) -> float:
    return max(stage.total_bytes for stage in memory_of_stages(job))


@FAST
@given(jobs())
def test_more_gpus_never_need_more_memory_each(job: Job) -> None:
    more = dataclasses.replace(job.layout, gpus=2 * job.layout.gpus)
    assert worst_bytes(dataclasses.replace(job, layout=more)) <= worst_bytes(job)


@FAST
@given(jobs(), st.sampled_from(["nvlink_bytes_per_s", "nic_bytes_per_s", "hbm_bytes_per_s"]))
def test_twice_the_bandwidth_never_slows_a_step(job: Job, link: str) -> None:
    faster = dataclasses.replace(job.gpu, **{link: 2 * getattr(job.gpu, link)})
    assert step_time(dataclasses.replace(job, gpu=faster)).step_s <= step_time(job).step_s * (1 + 1e-12)


@FAST
@given(jobs())
def test_energy_lies_between_idle_and_limit(job: Job) -> None:
    time = step_time(job)
    energy = step_energy(job, time, pue=1.3)
    gpu_seconds = time.step_s * job.layout.gpus
    assert job.gpu.idle_w * gpu_seconds <= energy.gpu_j <= job.gpu.tdp_w * gpu_seconds
    assert energy.gpu_j < energy.node_j < energy.fabric_j < energy.facility_j


@FAST
@given(jobs())
def test_units_are_consistent(job: Job) -> None:
    values = as_json(make_plan(job, steps=100))
    tokens = job.global_batch * job.seq_length
    speed = values["tokens_per_s_per_gpu"]
    assert speed * values["step_s"] * job.layout.gpus == pytest.approx(tokens)
    assert values["tflops_per_gpu"] * 1e12 == pytest.approx(speed * values["flops_per_token"])
    assert values["tokens_per_j"] * values["energy_j_per_step"] == pytest.approx(tokens)
    assert sum(values["time_s_by_cause"].values()) == pytest.approx(values["step_s"])
    assert sum(values["exposed_comm_s_by_kind"].values()) == pytest.approx(values["exposed_comm_s"])
    assert min(values["time_s_by_cause"].values()) >= 0
    run, energy = values["campaign"], values["energy"]
    assert run["days"] * 86_400 * run["goodput"] == pytest.approx(100 * values["step_s"])
    assert run["mwh"] * 3.6e9 == pytest.approx(energy["facility_w"] * run["days"] * 86_400)
    peak = max(job.gpu.peak_flops.values()) / 1e12
    assert values["tflops_per_gpu"] < peak
    assert all(proof["low"] <= values[name] <= proof["high"] for name, proof in values["evidence"].items())


@FAST
@given(jobs())
def test_uneven_experts_never_help(job: Job) -> None:
    def with_routing(routing: str) -> Job:
        return dataclasses.replace(job, plan=job.plan.model_copy(update={"routing": routing}))

    natural, balanced = with_routing("natural"), with_routing("balanced")
    assert step_time(natural).step_s >= step_time(balanced).step_s * (1 - 1e-12)
    assert worst_bytes(natural) >= worst_bytes(balanced) * (1 - 1e-12)


@FAST
@given(jobs())
def test_overlap_never_slows_a_step(job: Job) -> None:
    on, off = (
        dataclasses.replace(job, plan=job.plan.model_copy(update={"overlap_ep": on}), overlap_grads=on)
        for on in (True, False)
    )
    assert step_time(on).step_s <= step_time(off).step_s * (1 + 1e-12)


def slowest(ranks: tuple[int, ...], head: float) -> float:
    return max(*ranks[:-1], ranks[-1] + head)


@FAST
@given(st.integers(1, 24), st.integers(2, 4), st.integers(1, 4), st.floats(0, 6), st.booleans())
def test_the_slowest_rank_is_as_fast_as_can_be(
    layers: int, pp: int, vpp: int, head: float, starts_dense: bool
) -> None:
    chunks = balanced_chunks(layers, (pp, vpp), head, starts_dense=starts_dense)
    assert len(chunks) == pp * vpp
    assert sum(chunks) == layers
    assert min(chunks) >= 0
    splits = itertools.product(range(layers + 1), repeat=pp - 1)
    best = min(slowest((*some, layers - sum(some)), head) for some in splits if sum(some) <= layers)
    ranks = tuple(sum(chunks[rank::pp]) for rank in range(pp))
    assert slowest(ranks, head) == best
    assert all(max(chunks[rank::pp]) - min(chunks[rank::pp]) <= 1 for rank in range(pp - 1))


@FAST
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.integers(1, 6))
def test_bubble_of_the_closed_form_is_that_of_the_schedule_played_out(pp: int, vpp: int, rounds: int) -> None:
    layout, microbatches = Layout(gpus=pp, pp=pp, vpp=vpp if pp > 1 else 1), rounds * pp
    spans = timeline(layout, microbatches, [1.0] * pp, [2.0] * pp)
    bubble_s = (pp - 1) / layout.vpp * 3.0
    assert max(span.end_s for span in spans) == pytest.approx(microbatches * 3.0 + bubble_s)
    assert len(spans) == 2 * microbatches * pp * layout.vpp


@FAST
@given(jobs())
def test_step_lasts_as_long_as_the_schedule_played_out(job: Job) -> None:
    """What the closed form gives micro-batches and bubble, against the events, on uneven stages too."""
    time = step_time(job)
    forward_s = [s * share for s, share in zip(time.microbatch_s, time.forward_share, strict=True)]
    backward_s = [s - forward for s, forward in zip(time.microbatch_s, forward_s, strict=True)]
    spans = timeline(job.layout, job.num_microbatches, forward_s, backward_s)
    spent = time.spent
    closed_s = spent.total_s - spent.pp_s - spent.dp_s - spent.optimizer_s
    assert max(span.end_s for span in spans) == pytest.approx(closed_s, rel=0.15)


def test_no_stage_runs_two_passes_at_once_and_each_waits_for_its_input() -> None:
    layout = Layout(gpus=4, pp=4, vpp=2)
    spans = timeline(layout, 8, [1.0, 2.0, 1.5, 0.5], [2.0, 4.0, 3.0, 1.0])
    for stage in range(4):
        mine = [span for span in spans if span.work.stage == stage]
        assert all(before.end_s <= after.start_s for before, after in itertools.pairwise(mine))
    ends = {span.work: span.end_s for span in spans}
    for span in spans:
        if span.work.stage > 0 and not span.work.is_backward:
            before = dataclasses.replace(span.work, stage=span.work.stage - 1)
            assert ends[before] <= span.start_s


def test_head_takes_the_place_of_layers() -> None:
    assert balanced_chunks(61, (2, 1), 4.2) == (33, 28)


def test_chunks_of_a_rank_count_together() -> None:
    # A head that is worth four layers fills its rank, though one of two chunks of the rank does not have it.
    assert balanced_chunks(12, (4, 2), 4.0) == (2, 2, 2, 0, 2, 2, 2, 0)


def test_the_rank_that_starts_dense_gives_up_its_layers_last() -> None:
    assert balanced_chunks(10, (4, 1), 0.0) == (2, 2, 3, 3)
    assert balanced_chunks(10, (4, 1), 0.0, starts_dense=True) == (3, 2, 2, 3)
    assert balanced_chunks(5, (1, 2), 0.0, starts_dense=True) == (3, 2)


@FAST
@given(st.integers(1, 16), st.integers(1, 64))
def test_distinct_places_are_bounded(choices: int, places: int) -> None:
    found = expected_distinct(choices, places)
    assert 1 - 1e-9 <= found <= min(choices, places) + 1e-9


@FAST
@given(st.sampled_from([2, 8, 16, 64]), st.integers(1, 16), st.integers(1, 8))
def test_a_fused_dispatcher_sends_no_more_between_nodes(size: int, top_k: int, limit: int) -> None:
    group = Group(size=size, near=min(size, 8))
    plain = Exchange(tokens=4096, top_k=top_k, row_bytes=1024, dedup=False, max_domains=64)
    fused = dataclasses.replace(plain, dedup=True, max_domains=limit)
    assert exchange_bytes(fused, group)[1] <= exchange_bytes(plain, group)[1] * (1 + 1e-9)


def test_node_limit_cuts_what_the_network_carries() -> None:
    group = Group(size=64, near=8)
    free = Exchange(tokens=4096, top_k=8, row_bytes=14336, dedup=True, max_domains=64)
    limited = dataclasses.replace(free, max_domains=4)
    assert exchange_bytes(limited, group)[1] < exchange_bytes(free, group)[1]


def test_ring_sends_all_but_its_own_share() -> None:
    gpu = GPUS["h100"]
    one, two = (gather_s(1e9, Group(size=n, near=n), gpu) for n in (1, 2))
    assert one == 0
    assert two == pytest.approx(0.5e9 / (gpu.nvlink_bytes_per_s * gpu.efficiency.nvlink), rel=0.02)


@FAST
@given(st.floats(1, 600), st.floats(3600, 1e6), st.floats(0.3, 3))
def test_best_checkpoint_interval_is_best(checkpoint_s: float, mtbf_s: float, factor: float) -> None:
    best = best_interval_s(checkpoint_s, mtbf_s)
    if best < mtbf_s:
        assert goodput(checkpoint_s, best, mtbf_s, 600) >= goodput(checkpoint_s, best * factor, mtbf_s, 600)
