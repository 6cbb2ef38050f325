"""Memory: published peaks are in test_planner_validation; here the engine's own tensors, and laws."""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks_pool import RankPool

from moe.config import load_config
from moe.counts.checkpoint import host_bytes
from moe.planner.activations import Saved
from moe.planner.hardware_file import find_gpu
from moe.planner.memory import in_flight, memory_of_stages
from moe.planner.settings import Job, load_plan_config, make_job
from moe.planner.stages import held_params, stages_of
from moe.planner.validate import published_config

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SAVED = {*(field.name for field in fields(Saved)), "logits"}


def planned(overrides: tuple[str, ...], gpus: int = 1) -> Job:
    stated = (*overrides, "plan.kernels=torch", "plan.routing=balanced")
    return make_job(load_plan_config(QUICKSTART, stated), gpus, find_gpu("h100"))


def engine_bytes(overrides: tuple[str, ...]) -> dict[str, int]:
    """What torch holds after a step, and what a forward pass saves for the backward pass."""
    from moe.engine.megatron import MegatronEngine
    from moe.engine.megatron_optimizer import parts_of

    config = load_config(QUICKSTART, overrides)
    engine = MegatronEngine(config)
    parameters = list(engine.ddps[0].parameters())
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved = saved_bytes(engine, config)
    states = [state for one in parts_of(engine.optimizer) for state in one.optimizer.state.values()]
    tensors = [t for state in states for t in state.values() if torch.is_tensor(t) and t.dim() > 0]
    # A main parameter is a view of the model's own in fp32, another tensor in bf16.
    mains = [p for one in parts_of(engine.optimizer) for g in one.optimizer.param_groups for p in g["params"]]
    tensors += [p for p in mains if p.untyped_storage().data_ptr() not in known]
    found = {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(p.main_grad.numel() * p.main_grad.element_size() for p in parameters),
        "optimizer": sum(t.numel() * t.element_size() for t in tensors),
        "saved": saved,
        "to save": gathered_to_save(engine),
    }
    written, expected = checkpoint_size(engine)
    assert abs(written / expected - 1) < 0.01, f"{written} bytes on disk, {expected} planned"
    engine.close()
    return found


def saved_bytes(engine: Any, config: Any) -> int:
    """What a forward pass saves for the backward pass, after a step."""
    known = {parameter.untyped_storage().data_ptr() for parameter in engine.ddps[0].parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # storages stay alive, so no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    batch = random_batch(config)
    engine.train_step(iter([batch] * engine.num_microbatches), lr=1e-3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, _ = engine._forward_step(iter([batch]), engine.ddps[0])
    del output
    return sum(storage.nbytes() for storage in saved.values())


def saved_on_rank(overrides: tuple[str, ...], num_ranks: int) -> int:
    """As saved_bytes, on each of a few ranks."""
    from moe.engine.megatron import MegatronEngine

    config = load_config(QUICKSTART, overrides, world_size=num_ranks)
    engine = MegatronEngine(config)
    try:
        return saved_bytes(engine, config)
    finally:
        engine.close()


def checkpoint_size(engine: Any) -> tuple[int, int]:
    """(on disk, as the engine says)."""
    from moe.engine.megatron_state import save_state

    with tempfile.TemporaryDirectory() as folder:
        save_state(engine.models, engine.optimizer, Path(folder))
        return sum(path.stat().st_size for path in Path(folder).iterdir()), engine.checkpoint_bytes


def gathered_to_save(engine: Any) -> int:
    """Bytes of optimizer state that is gathered in the memory of a rank's host to write it."""
    from moe.engine import megatron_moments
    from moe.engine.megatron_optimizer import parts_of
    from moe.model.build import sharded_state

    gathered = []
    gather = megatron_moments.whole_states

    def gather_and_note(*args: Any, **options: Any) -> Any:
        states = gather(*args, **options)
        tensors = [t for of in states.values() for whole in of.values() for t in whole.values()]
        gathered.extend(t.nbytes for t in tensors)
        return states

    model_state = {str(i): sharded_state(model) for i, model in enumerate(engine.models)}
    with patch.object(megatron_moments, "whole_states", gather_and_note):
        for part in parts_of(engine.optimizer):
            megatron_moments.sharded_moments(part, model_state, is_loading=False)
    return sum(gathered)


def random_batch(config: Any) -> dict[str, torch.Tensor]:
    B, S = config.train.micro_batch_size, config.data.seq_length
    tokens_BS = torch.randint(0, config.model.vocab_size, (B, S))
    positions_BS = torch.arange(S).expand(B, S).contiguous()
    return {
        "tokens_BS": tokens_BS,
        "labels_BS": tokens_BS,
        "loss_mask_BS": torch.ones(B, S),
        "position_ids_BS": positions_BS,
    }


def rank_params(overrides: tuple[str, ...], num_ranks: int) -> tuple[int, int]:
    """(dense, expert) numbers that this rank holds."""
    from moe.engine.megatron import MegatronEngine

    engine = MegatronEngine(load_config(QUICKSTART, overrides, world_size=num_ranks))
    named = list(engine.ddps[0].named_parameters())
    engine.close()
    experts = sum(parameter.numel() for name, parameter in named if ".experts." in name)
    return sum(parameter.numel() for _, parameter in named) - experts, experts


@pytest.fixture(scope="module")
def pool(start_ranks: Any) -> RankPool:
    ranks: RankPool = start_ranks(4, init_process_group=False)
    return ranks


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.precision=bf16",),
        ("model.top_k=8", "data.seq_length=128"),
        ("model.num_dense_layers=0", "model.shared_expert_hidden_size=0"),
        ("model.attention.qk_norm=head",),
        ("train.micro_batch_size=2",),
        ("train.precision=bf16", "model.expert_precision=fp8", "model.expert_fp8_input_store=true"),
        ("model.attention.sinks=true",),
        ("model.attention.sinks=true", "train.precision=bf16", "train.micro_batch_size=2"),
        ("model.attention.sliding_window=16", "train.micro_batch_size=2"),
        ("optim.name=muon", "train.precision=bf16", "train.micro_batch_size=2"),
        ("model.mtp_layers=1", "train.micro_batch_size=2"),
        ("train.recompute=selective", "train.micro_batch_size=2"),
    ],
    ids=lambda overrides: " ".join(overrides) or "quickstart",
)
def test_engine_holds_what_was_planned(pool: RankPool, overrides: tuple[str, ...]) -> None:
    (found,) = pool.run(engine_bytes, overrides, num_ranks=1)
    stage = memory_of_stages(planned(overrides))[0]
    assert stage.weights == pytest.approx(found["weights"], rel=0.05)
    assert stage.gradients == pytest.approx(found["gradients"], rel=0.01)
    assert stage.optimizer == pytest.approx(found["optimizer"], rel=0.05)
    saved = sum(value for part, value in stage.parts.items() if part in SAVED)
    assert saved == pytest.approx(found["saved"], rel=0.05)
    to_save = host_bytes(sum(held_params(planned(overrides), stages_of(planned(overrides))[0])))
    assert to_save == pytest.approx(found.pop("to save"), rel=0.001)
    assert stage.total_bytes - stage.workspace == pytest.approx(sum(found.values()), rel=0.05)


def test_a_rank_of_a_context_saves_keys_and_values_of_all_positions(pool: RankPool) -> None:
    sizes = ("qk_nope_head_dim=16", "qk_rope_head_dim=16", "v_head_dim=32", "kv_lora_rank=64")
    latent = ("kind=mla", "q_lora_rank=96", *sizes)
    overrides = ("parallel.cp=2", "train.micro_batch_size=2", *(f"model.attention.{one}" for one in latent))
    found = pool.run(saved_on_rank, overrides, 2, num_ranks=2)
    stage = memory_of_stages(planned(overrides, 2))[0]
    saved = sum(value for part, value in stage.parts.items() if part in SAVED)
    assert [saved / one for one in found] == pytest.approx([1, 1], rel=0.05)


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.ep=4",),
        ("parallel.tp=2", "parallel.ep=2"),
        ("parallel.pp=2", "parallel.ep=2"),
        ("parallel.tp=2", "parallel.pp=2"),
        ("parallel.etp=2", "parallel.ep=2", "parallel.tp=2", "model.expert_bias=true"),
        ("parallel.etp=2", "parallel.pp=2"),
    ],
    ids=" ".join,
)
def test_every_rank_holds_as_many_numbers_as_planned(pool: RankPool, layout: tuple[str, ...]) -> None:
    job = planned((*layout, "train.micro_batch_size=1"), 4)
    found = pool.run(rank_params, (*layout, "train.micro_batch_size=1"), 4, num_ranks=4)
    stages = [held_params(job, stage) for stage in stages_of(job)]
    assert [tuple(one) for one in found] == [stage for stage in stages for _ in range(4 // len(stages))]


def test_pipeline_holds_more_at_its_start() -> None:
    job = planned(("parallel.pp=4", "train.micro_batch_size=1", "parallel.stage_layers=[1,1,1,1]"), 4)
    assert [in_flight(job, stage) for stage in stages_of(job)] == [4, 3, 2, 1]


def test_interleaved_pipeline_warms_up_more_chunks() -> None:
    config = load_plan_config(
        published_config("qwen3_235b_a22b"), ("parallel.pp=4", "parallel.vpp=2", "parallel.ep=8")
    )
    job = make_job(config, 32, find_gpu("b200"))
    # 2 (pp - i - 1) + (v - 1) pp + 1 chunks, of which two are a whole micro-batch.
    assert [in_flight(job, stage) * 2 for stage in stages_of(job)] == [11, 9, 7, 5]


def test_few_micro_batches_fill_no_pipeline() -> None:
    job = planned(("parallel.pp=4", "train.global_batch_size=2", "train.micro_batch_size=1"), 4)
    assert max(in_flight(job, stage) for stage in stages_of(job)) == 2


@pytest.mark.parametrize("part", ["full", "moe_act", "mla_up_proj", "layernorm", "mlp", "moe"])
def test_recomputing_saves_memory(part: str) -> None:
    def saved(*overrides: str) -> float:
        config = load_plan_config(
            published_config("deepseek_v3"), ("parallel.ep=64", "plan.kernels=te", *overrides)
        )
        stage = memory_of_stages(make_job(config, 256, find_gpu("gb300")))[0]
        return sum(value for name, value in stage.parts.items() if name in SAVED)

    assert saved(f"plan.recompute=[{part}]") < saved()


def test_zero_shares_out_states_level_by_level() -> None:
    def states(zero: int) -> tuple[float, float, float]:
        stage = memory_of_stages(planned((f"plan.zero={zero}", "parallel.ep=2"), 2))[0]
        return stage.weights, stage.gradients, stage.optimizer

    none, one, two, three = map(states, range(4))
    assert one[:2] == none[:2]
    assert one[2] < none[2]
    assert (two[0], two[2]) == (one[0], one[2])
    assert two[1] < one[1]
    assert three[1:] == two[1:]
    assert three[0] < two[0]


def test_torch_adamw_makes_a_second_set_of_roots_that_a_fused_one_does_not() -> None:
    """Of so short a sequence that the update, not the backward pass, is the peak."""

    def beside_states(*overrides: str) -> float:
        config = load_plan_config(QUICKSTART, ("data.seq_length=8", "train.micro_batch_size=1", *overrides))
        stage = memory_of_stages(make_job(config, 1, find_gpu("h100")))[0]
        return sum(value for name, value in stage.parts.items() if name in (*SAVED, "workspace"))

    stage = stages_of(planned(()))[0]
    assert beside_states("plan.kernels=ours") == pytest.approx(4 * max(held_params(planned(()), stage)))
    assert beside_states("plan.kernels=te") < beside_states("plan.kernels=ours") / 2
