"""QK-clip: the largest logits, which rows are scaled, and the effect on a model in several layouts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from checkpoint_tensors import tensors
from muon_runs import MLA, batches, config_of
from ranks_pool import RankPool
from tolerances import assert_close
from torch import Tensor

from moe.config.schema import AttentionSection
from moe.optim.qk_clip import LargestLogits, largest_logits, row_factors


def logits_of(q_SBHd: Tensor, k_TBGd: Tensor, window: int) -> Tensor:
    """Unscaled, [B, H, S, T], where hidden -inf."""
    S, T, shared = len(q_SBHd), len(k_TBGd), q_SBHd.shape[2] // k_TBGd.shape[2]
    logits = torch.einsum("sbhd,tbhd->bhst", q_SBHd, k_TBGd.repeat_interleave(shared, dim=2))
    distance = torch.arange(T - S, T)[:, None] - torch.arange(T)
    return logits.masked_fill((distance < 0) | (distance >= (window or T)), -torch.inf)


@pytest.mark.parametrize(
    ("S", "T", "G", "window"), [(7, 7, 4, 0), (300, 300, 2, 0), (270, 540, 1, 0), (300, 300, 4, 9)]
)
def test_largest_logits_are_those_of_visible_keys(S: int, T: int, G: int, window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(S, 2, 4, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(T, 2, G, 8, generator=generator, dtype=torch.float64)
    k[-1] *= 30  # seen by the last query only
    found = largest_logits(q, k, scale=0.3, window=window)
    assert_close(
        "largest", found, logits_of(q, k, window).amax(dim=(0, 2, 3)).float() * 0.3, dtype=torch.float32
    )


def test_passes_are_joined_until_taken_and_evaluation_is_none() -> None:
    noted = LargestLogits()
    key = torch.ones(1, 1, 1, 1)
    for size in (2.0, 5.0, 3.0):
        noted.note(key * size, key, scale=1.0)
    with torch.no_grad():
        noted.note(key * 100, key, scale=1.0)
    assert noted.take().tolist() == [5.0]
    noted.note(key, key, scale=1.0)
    assert noted.take().tolist() == [1.0]
    with pytest.raises(AssertionError, match="no forward pass"):
        noted.take()


GAMMA = torch.tensor([1.0, 0.25])


@pytest.mark.parametrize("groups", [2, 1])
def test_grouped_queries_and_keys_give_gamma_times_the_logits(groups: int) -> None:
    attention = AttentionSection(num_heads=2, num_query_groups=groups, head_dim=4)
    factors = row_factors("linear_qkv.weight", GAMMA, attention)
    assert factors is not None
    q_GrD, k_G1d, v_G1d = factors.view(groups, 2 // groups + 2, 4).split([2 // groups, 1, 1], dim=1)
    assert torch.equal((q_GrD * k_G1d).reshape(2, 4), GAMMA[:, None].expand(2, 4))
    assert torch.equal(v_G1d, torch.ones_like(v_G1d))
    if groups == 1:  # the key is shared with a head that is not to be clipped
        assert torch.equal(k_G1d, torch.ones_like(k_G1d))


def test_latent_queries_and_keys_give_gamma_times_the_logits() -> None:
    attention = AttentionSection(
        kind="mla", num_heads=2, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=4
    )
    q, kv = (row_factors(f"linear_{name}_up.weight", GAMMA, attention) for name in ("q", "kv"))
    assert q is not None
    assert kv is not None
    q_Hd, kv_Hd = q.view(2, 5), kv.view(2, 7)
    assert torch.equal(q_Hd[:, :3] * kv_Hd[:, :3], GAMMA[:, None].expand(2, 3))
    assert torch.equal(q_Hd[:, 3:], GAMMA[:, None].expand(2, 2))  # times a rotated key that all heads share
    assert torch.equal(kv_Hd[:, 3:], torch.ones(2, 4))
    assert row_factors("linear_kv_down.weight", GAMMA, attention) is None


def clipped(overrides: list[str], save_to: Path) -> list[float | None]:
    """On one rank of a job: train with a low tau; losses, and the largest logits."""
    from moe.checkpoint.save import save_checkpoint
    from moe.engine.megatron import MegatronEngine

    torch.set_num_threads(1)
    config = config_of(overrides, int(os.environ["WORLD_SIZE"]))
    engine = MegatronEngine(config)
    try:
        results = [
            engine.train_step(batches(config, step, engine.dp_rank, engine.layout.dp), lr=1e-2)
            for step in range(3)
        ]
        save_checkpoint(engine, save_to, 3, {}, keep=1)
        return [result.loss for result in results] + [result.max_attention_logit for result in results]
    finally:
        engine.close()


def logits_computed(overrides: list[str]) -> tuple[int, float | None]:
    """How often in a step, and the largest."""
    from moe.engine.megatron import MegatronEngine

    torch.set_num_threads(1)
    config = config_of(overrides, 1)
    engine = MegatronEngine(config)
    try:
        with patch("moe.optim.qk_clip.largest_logits", wraps=largest_logits) as counted:
            result = engine.train_step(batches(config, 0, 0, 1), lr=1e-2)
        return counted.call_count, result.max_attention_logit
    finally:
        engine.close()


@pytest.fixture(scope="module")
def pool(start_ranks: Any) -> RankPool:
    ranks: RankPool = start_ranks(4, init_process_group=False)
    return ranks


TAU = ["optim.qk_clip=0.02"]


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ([], ["parallel.tp=2", "parallel.ep=2"]),
        pytest.param(MLA, ["parallel.pp=2", "parallel.cp=2"], marks=pytest.mark.slow),
        pytest.param(MLA, ["parallel.tp=2", "train.recompute=full"], marks=pytest.mark.slow),
        pytest.param(["optim.name=adamw"], ["train.recompute=selective"], marks=pytest.mark.slow),
    ],
    ids=["gqa tp2 dp2", "mla pp2 cp2", "mla tp2 dp2 full", "gqa adamw dp4 selective"],
)
def test_layout_clips_as_one_rank_does(
    model: list[str], layout: list[str], pool: RankPool, tmp_path: Path
) -> None:
    [expected] = pool.run(clipped, [*model, *TAU], tmp_path / "one", num_ranks=1)
    found = pool.run(clipped, [*model, *TAU, *layout], tmp_path / "four", num_ranks=4)
    assert found == [pytest.approx(expected, rel=1e-4)] * 4
    one, four = (tensors(tmp_path / name / "step_00000003") for name in ("one", "four"))
    for key in one:
        if "linear_q" in key or "linear_kv" in key:
            assert float((four[key] - one[key]).abs().max()) <= 1e-3 * float(one[key].abs().max()), key
    # It was not for nothing: without clipping the same weights are larger.
    [_] = pool.run(clipped, model, tmp_path / "free", num_ranks=1)
    free = tensors(tmp_path / "free" / "step_00000003")
    queries = [key for key in one if key.startswith("decoder") and "linear_q" in key and "down" not in key]
    assert queries
    assert all(float(one[key].norm()) < 0.97 * float(free[key].norm()) for key in queries)


@pytest.mark.parametrize(("model", "attentions"), [([], 2), (MLA, 3)], ids=["gqa", "mla, mtp"])
def test_what_is_computed_again_is_not_noted_again(pool: RankPool, model: list[str], attentions: int) -> None:
    once, largest = pool.run(logits_computed, [*model, *TAU], num_ranks=1)[0]
    assert once == attentions * 4  # micro-batches
    assert largest is not None
    for recompute in ("selective", "full"):
        assert pool.run(logits_computed, [*model, *TAU, f"train.recompute={recompute}"], num_ranks=1) == [
            (once, largest)
        ]
