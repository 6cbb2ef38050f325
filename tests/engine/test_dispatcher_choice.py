"""parallel.dispatcher and overlap in the engine: other ways of the same rows, the same training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_pool import RankPool

from moe.config import load_config
from moe.errors import InputError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SETTINGS = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.vocab_size=96",
    "model.num_experts=8",
    "model.expert_hidden_size=16",
    "model.shared_expert_hidden_size=24",
    "model.attention.num_heads=4",
    "model.attention.head_dim=8",
    "data.seq_length=16",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "parallel.tp=2",
    "parallel.ep=4",
)


def train(*overrides: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of three steps on this rank."""
    from moe.engine.megatron import MegatronEngine

    torch.set_num_threads(1)
    config = load_config(QUICKSTART, [*SETTINGS, *overrides], world_size=int(os.environ["WORLD_SIZE"]))
    engine = MegatronEngine(config)
    S, B, V = config.data.seq_length, config.train.micro_batch_size, config.model.vocab_size
    generator = torch.Generator().manual_seed(engine.dp_rank)

    def batches() -> Any:
        for _ in range(engine.num_microbatches):
            tokens = torch.randint(0, V, (B, S + 1), generator=generator)
            yield {
                "tokens_BS": tokens[:, :-1].contiguous(),
                "labels_BS": tokens[:, 1:].contiguous(),
                "loss_mask_BS": torch.ones(B, S),
                "position_ids_BS": torch.arange(S).expand(B, S),
            }

    try:
        results = [engine.train_step(batches(), 3e-3) for _ in range(3)]
        return [(result.loss, result.grad_norm) for result in results]
    finally:
        engine.close()


@pytest.fixture(scope="module")
def plain(start_ranks: Any) -> tuple[RankPool, list[tuple[float, float]]]:
    pool: RankPool = start_ranks(4, init_process_group=False)
    return pool, pool.run(train)[0]


def test_two_hops_train_alike(plain: tuple[RankPool, list[tuple[float, float]]]) -> None:
    pool, expected = plain
    (found, *_) = pool.run(train, "parallel.dispatcher=hierarchical", "parallel.ranks_per_node=2")
    for step, (one, two) in enumerate(zip(found, expected, strict=True)):
        assert one == pytest.approx(two, rel=1e-5), f"step {step + 1}"


def test_overlap_trains_to_the_same_bits(plain: tuple[RankPool, list[tuple[float, float]]]) -> None:
    pool, expected = plain
    assert pool.run(train, "parallel.overlap_shared_expert=true")[0] == expected


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("parallel.dispatcher=deepep",), ("deep_ep", "sm_90", "sm_100", "parallel.dispatcher=hierarchical")),
        (("parallel.dispatcher=hybridep",), ("hybrid-ep", "sm_90", "sm_100")),
        (
            ("parallel.dispatcher=hierarchical", "parallel.ranks_per_node=4"),
            ("parallel.ep=4", "parallel.ranks_per_node=4", "parallel.dispatcher=alltoall"),
        ),
        (("parallel.dispatcher=hierarchical", "parallel.ranks_per_node=3"), ("two or more whole nodes",)),
    ],
)
def test_what_cannot_run_is_refused_before_start(overrides: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        load_config(QUICKSTART, [*SETTINGS, *overrides], world_size=4)
    for word in words:
        assert word in str(caught.value)


def refusal_on_rank() -> str:
    with pytest.raises(InputError) as caught:
        train("parallel.dispatcher=hierarchical")
    return str(caught.value)


def test_launcher_with_one_node_is_told(plain: tuple[RankPool, list[tuple[float, float]]]) -> None:
    pool, _ = plain
    for text in pool.run(refusal_on_rank):
        assert "parallel.ranks_per_node=0, 4 were started here" in text
