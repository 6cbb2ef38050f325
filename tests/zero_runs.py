"""Small runs of both engines on gloo ranks; imported by the tests of the DeepSpeed engine as zero_runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_pool import RankPool

from moe.config import RunConfig, load_config

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
# Every kind of parameter; two micro-batches on two data-parallel ranks; the norm of the gradients is above 1,
# where they are clipped.
MODEL = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.vocab_size=96",
    "model.num_experts=8",
    "model.expert_hidden_size=16",
    "model.shared_expert_hidden_size=24",
    "model.mtp_layers=1",
    "model.attention.num_heads=8",
    "model.attention.num_query_groups=4",
    "model.attention.head_dim=8",
    "data.seq_length=16",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
)
# What DeepSpeed imports and our layer compiles at its first use, once for all ranks.
PRELOAD = (
    "torch.distributed",
    "moe.engine.megatron",
    "moe.engine.deepspeed",
    "moe.kernels.expert_mlp.torch_backend",
)
LAYOUTS = {
    "dp2": (2, ()),
    "ep2": (2, ("parallel.ep=2",)),
    "tp2": (2, ("parallel.tp=2",)),
    "tp2 ep2": (4, ("parallel.tp=2", "parallel.ep=2")),
}


def zero(stage: int) -> tuple[str, ...]:
    """Overrides that choose DeepSpeed."""
    return ("engine.name=deepspeed", f"engine.zero_stage={stage}")


@dataclass(frozen=True)
class Task:
    """What a job does."""

    overrides: tuple[str, ...] = ()
    steps: int = 5
    load_from: Path | None = None
    weights_from: Path | None = None
    steps_before: int = 0
    save_to: Path | None = None
    starved: bool = False  # the first half of the experts gets every token


def config_of(overrides: tuple[str, ...], world_size: int) -> RunConfig:
    return load_config(QUICKSTART, [*MODEL, *overrides], world_size=world_size)


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


def make_engine(config: RunConfig) -> Any:
    if config.engine.name == "deepspeed":
        from moe.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config)
    from moe.engine.megatron import MegatronEngine

    return MegatronEngine(config)


def starve(engine: Any) -> None:
    """Send every token to the first half of the experts, which expert parallelism puts on other ranks."""
    for adapter in engine.moe_layers.values():
        bias_E = adapter.layer.router.bias_E
        bias_E[: len(bias_E) // 2] += 100


def train(task: Task) -> dict[str, Any]:
    """On one rank of a job: what every rank should agree on."""
    from moe.checkpoint.save import save_checkpoint

    torch.set_num_threads(1)
    config = config_of(task.overrides, int(os.environ["WORLD_SIZE"]))
    engine = make_engine(config)
    try:
        if task.load_from is not None:
            engine.load_shards(task.load_from, task.steps_before)
        if task.weights_from is not None:
            engine.load_weights(task.weights_from)
        if task.starved:
            starve(engine)
        last = task.steps_before + task.steps
        results = [
            engine.train_step(batches(config, step, engine.dp_rank, engine.layout.dp), lr=3e-3)
            for step in range(task.steps_before, last)
        ]
        if task.save_to is not None:
            save_checkpoint(engine, task.save_to, last, {}, keep=9)
        evaluated = engine.evaluate(
            batches(config, 999, engine.dp_rank, engine.layout.dp),
            engine.num_microbatches,
            torch.full((config.model.vocab_size,), 3),
        )
        torch.distributed.barrier()
        return {
            "loss": [result.loss for result in results],
            "mtp_loss": [result.mtp_loss for result in results],
            "balance_loss": [result.balance_loss for result in results],
            "z_loss": [result.z_loss for result in results],
            "grad_norm": [result.grad_norm for result in results],
            "counts": [result.counts_LE.tolist() for result in results],
            "params_total": engine.params_total,
            "heldout": (evaluated.nll_nats, evaluated.tokens, evaluated.text_bytes),
        }
    finally:
        engine.close()


def trained(pool: RankPool, num_ranks: int, task: Task) -> dict[str, Any]:
    """The result of a job, which all its ranks must agree on."""
    results = pool.run(train, task, num_ranks=num_ranks)
    assert all(result == results[0] for result in results)
    whole: dict[str, Any] = results[0]
    return whole


def assert_same_curve(found: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    for name in ("loss", "mtp_loss", "balance_loss", "z_loss", "grad_norm", "heldout"):
        assert found[name] == pytest.approx(expected[name], rel=rel), name
    assert found["counts"][0] == expected["counts"][0]
    assert found["params_total"] == expected["params_total"]
