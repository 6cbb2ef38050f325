"""The Megatron engine on 1 to 4 gloo ranks: one model, one curve, whatever the layout."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_tensors import assert_bit_equal, tensors
from ranks_pool import RankPool

from moe.config import RunConfig, load_config
from moe.counts.counts import params_total
from moe.counts.shape import shape_of

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SIZES = (
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.vocab_size=96",
    "model.num_experts=8",
    "model.expert_hidden_size=16",
    "model.shared_expert_hidden_size=24",
    "model.attention.num_heads=8",
    "model.attention.num_query_groups=4",
    "model.attention.head_dim=8",
    "data.seq_length=16",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
)
MLA = (
    "model.attention.kind=mla",
    "model.attention.kv_lora_rank=12",
    "model.attention.qk_nope_head_dim=8",
    "model.attention.qk_rope_head_dim=4",
    "model.attention.v_head_dim=6",
)
SOFTMAX = (
    "model.router.score=softmax",
    "model.router.score_before_topk=false",
    "model.router.renormalize=false",
    "model.router.aux_loss=batch",
    "model.router.bias_update_rate=0",
    "model.router.scale=1.5",
)


def config_of(overrides: tuple[str, ...], world_size: int) -> RunConfig:
    return load_config(QUICKSTART, [*SIZES, *overrides], world_size=world_size)


def batches(config: RunConfig, step: int, dp_rank: int, dp_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's part of the global batch, the same in every layout; a sequence counts on from its start."""
    S, V = config.data.seq_length, config.model.vocab_size
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, V, (config.train.global_batch_size, 1), generator=generator)
    tokens = (starts + torch.arange(S + 1)) % V
    micro = config.train.micro_batch_size
    for first in range(dp_rank * micro, len(tokens), dp_size * micro):
        part = tokens[first : first + micro]
        yield {
            "tokens_BS": part[:, :-1].contiguous(),
            "labels_BS": part[:, 1:].contiguous(),
            "loss_mask_BS": torch.ones(micro, S),
            "position_ids_BS": torch.arange(S).expand(micro, S),
        }


def train(
    overrides: tuple[str, ...],
    steps: int,
    save_to: Path | None = None,
    load_from: Path | None = None,
    steps_before: int = 0,
) -> dict[str, Any]:
    """On one rank of a job: train, and tell what every rank should agree on."""
    from moe.checkpoint.save import save_checkpoint
    from moe.engine.megatron import MegatronEngine

    torch.set_num_threads(1)
    config = config_of(overrides, int(os.environ["WORLD_SIZE"]))
    engine = MegatronEngine(config)
    try:
        if load_from is not None:
            engine.load_shards(load_from, steps_before)
        results = [
            engine.train_step(batches(config, step, engine.dp_rank, engine.layout.dp), lr=3e-3)
            for step in range(steps_before, steps_before + steps)
        ]
        if save_to is not None:
            save_checkpoint(engine, save_to, steps_before + steps, {}, keep=9)
        evaluated = engine.evaluate(
            batches(config, 999, engine.dp_rank, engine.layout.dp),
            engine.num_microbatches,
            torch.full((config.model.vocab_size,), 3),
        )
        dist.barrier()
        return {
            "loss": [result.loss for result in results],
            "balance_loss": [result.balance_loss for result in results],
            "z_loss": [result.z_loss for result in results],
            "grad_norm": [result.grad_norm for result in results],
            "counts": [result.counts_LE.tolist() for result in results],
            "params_total": engine.params_total,
            "heldout": (evaluated.nll_nats, evaluated.tokens, evaluated.text_bytes),
        }
    finally:
        engine.close()


@pytest.fixture(scope="module")
def pool(start_ranks: Any) -> RankPool:
    ranks: RankPool = start_ranks(4, init_process_group=False)
    return ranks


def trained(pool: RankPool, num_ranks: int, *args: Any) -> dict[str, Any]:
    """The result of a job, which all its ranks must agree on."""
    results = pool.run(train, *args, num_ranks=num_ranks)
    assert all(result == results[0] for result in results)
    whole: dict[str, Any] = results[0]
    return whole


@pytest.mark.parametrize(
    ("model", "num_ranks", "layout"),
    [
        ((), 1, ("train.micro_batch_size=8",)),
        ((), 4, ("parallel.tp=4", "parallel.ep=4")),
        ((), 4, ("parallel.ep=1",)),
        (MLA, 2, ("parallel.tp=2",)),
        ((*MLA, "model.attention.q_lora_rank=10"), 4, ("parallel.tp=2", "parallel.pp=2")),
        (("model.tie_embeddings=true",), 4, ("parallel.pp=2", "parallel.ep=2")),
        (SOFTMAX, 4, ("parallel.tp=2", "parallel.ep=2", "train.micro_batch_size=2")),
        (("model.shared_expert_hidden_size=0", "model.num_dense_layers=0"), 2, ("parallel.tp=2",)),
    ],
    ids=[
        "one micro-batch",
        "tp4 ep4",
        "dp4 with all experts on every rank",
        "mla tp2",
        "mla with q_lora tp2 pp2",
        "tied embeddings pp2 ep2",
        "softmax over top-k, batch loss, tp2 ep2",
        "experts only tp2",
    ],
)
def test_layout_gives_the_curve_of_one_rank(
    pool: RankPool, model: tuple[str, ...], num_ranks: int, layout: tuple[str, ...]
) -> None:
    expected = trained(pool, 1, model, 5)
    found = trained(pool, num_ranks, (*model, *layout), 5)
    for name in ("loss", "balance_loss", "z_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert found["heldout"] == pytest.approx(expected["heldout"], rel=1e-5)
    assert found["counts"][0] == expected["counts"][0]
    assert found["params_total"] == expected["params_total"]


def test_loss_falls_and_counts_add_up(pool: RankPool) -> None:
    config = config_of((), 1)
    result = trained(pool, 1, (), 30)
    assert result["loss"][0] == pytest.approx(math.log(config.model.vocab_size), rel=0.05)
    assert result["loss"][-1] < result["loss"][0] - 1.0
    routed = config.train.global_batch_size * config.data.seq_length * config.model.top_k
    assert {sum(row) for step in result["counts"] for row in step} == {routed}


@pytest.mark.parametrize("model", [(), MLA, ("model.tie_embeddings=true",)], ids=["gqa", "mla", "tied"])
def test_parameters_are_those_of_the_closed_form(pool: RankPool, model: tuple[str, ...]) -> None:
    expected = params_total(shape_of(config_of(model, 1).model))
    assert trained(pool, 1, model, 0)["params_total"] == expected
    assert trained(pool, 2, (*model, "parallel.pp=2"), 0)["params_total"] == expected


def test_bf16_follows_fp32_and_keeps_fp32_main_parameters(pool: RankPool, tmp_path: Path) -> None:
    fp32 = trained(pool, 1, (), 8)
    bf16 = trained(pool, 2, ("train.precision=bf16", "parallel.tp=2"), 8, tmp_path)
    assert bf16["loss"] == pytest.approx(fp32["loss"], rel=2e-2)
    saved = tensors(tmp_path / "step_00000008")
    expert = "decoder.layers.1.mlp.layer.experts.w_down_eDF"
    assert saved[expert].dtype == torch.bfloat16
    assert saved[f"optimizer.state.param.{expert}"].dtype == torch.float32
    assert torch.equal(saved[f"optimizer.state.param.{expert}"].bfloat16(), saved[expert])
    assert saved["decoder.layers.1.mlp.layer.router.weight_ED"].dtype == torch.float32


@pytest.mark.parametrize(
    ("precision", "before", "after"),
    [
        ("fp32", (4, ("parallel.tp=2", "parallel.ep=2")), (4, ("parallel.pp=2", "parallel.ep=2"))),
        ("fp32", (2, ("parallel.pp=2",)), (4, ("parallel.tp=4",))),
        ("fp32", (1, ()), (4, ("parallel.pp=4",))),
        ("bf16", (1, ()), (4, ("parallel.tp=2", "parallel.ep=4"))),
        ("bf16", (4, ("parallel.ep=4",)), (1, ())),
    ],
    ids=[
        "tp2ep2 to pp2ep2",
        "pp2 to tp4",
        "1 to pp4 with a stage without experts",
        "bf16 1 to tp2ep4",
        "bf16 ep4 to 1",
    ],
)
def test_reshard_changes_no_byte(
    pool: RankPool, tmp_path: Path, precision: str, before: Any, after: Any
) -> None:
    kind = f"train.precision={precision}"
    trained(pool, before[0], (kind, *before[1]), 3, tmp_path / "before")
    written = tmp_path / "before" / "step_00000003"
    trained(pool, after[0], (kind, *after[1]), 0, tmp_path / "after", written, 3)
    assert_bit_equal(tmp_path / "after" / "step_00000003", written)


def diverge(weight: str) -> str:
    from moe.engine.base import TrainingDivergedError
    from moe.engine.megatron import MegatronEngine

    config = config_of((), 1)
    engine = MegatronEngine(config)
    try:
        with torch.no_grad():
            engine.models[0].get_parameter(weight).fill_(float("nan"))
        engine.train_step(batches(config, 0, 0, 1), lr=1e-3)
    except TrainingDivergedError as error:
        return str(error)
    finally:
        engine.close()
    return "no error"


def test_loss_that_is_not_finite_stops_before_the_update(pool: RankPool) -> None:
    (message,) = pool.run(diverge, "output_layer.weight", num_ranks=1)
    assert "loss is nan; no update was made. Lower optim.lr" in message


def test_a_router_that_met_nan_is_named_with_its_rank(pool: RankPool) -> None:
    (message,) = pool.run(diverge, "decoder.layers.1.mlp.layer.router.weight_ED", num_ranks=1)
    assert "The first router with NaN logits is that of layer 1, on rank 0. Lower" in message
