"""The closed form of what a rank sends in a step equals what gloo ranks really send."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks_pool import RankPool
from sent_bytes import SentBytes
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes

from moe.planner.bytes_sent import bytes_sent
from moe.planner.hardware import GPUS
from moe.planner.settings import Job, load_plan_config, make_job

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
TOLERANCE = 0.02  # Megatron pads its buffers
PER_RANK = 4  # sequences: the batch grows with the data-parallel ranks
SIZES = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.vocab_size=512",
    "model.num_experts=8",
    "model.expert_hidden_size=64",
    "model.shared_expert_hidden_size=64",
    "model.attention.num_heads=4",
    "model.attention.head_dim=16",
    "data.seq_length=64",
    "train.micro_batch_size=2",
)
MLA = (
    "model.attention.kind=mla",
    "model.attention.q_lora_rank=24",
    "model.attention.kv_lora_rank=16",
    "model.attention.qk_nope_head_dim=16",
    "model.attention.qk_rope_head_dim=8",
    "model.attention.v_head_dim=16",
)


def step_on_rank(overrides: tuple[str, ...]) -> tuple[dict[str, float], tuple[int, int]]:
    """Of the second step, when nothing is set up any more: what this rank sends, (pairs routed away, all)."""
    from megatron.core import parallel_state

    from moe.config import load_config
    from moe.engine.megatron import MegatronEngine
    from moe.train.stop import StopRequest

    torch.set_num_threads(1)
    config = load_config(QUICKSTART, list(overrides), world_size=int(os.environ["WORLD_SIZE"]))
    engine = MegatronEngine(config)
    routed = []  # counts_E of this rank, of each layer and micro-batch
    for adapter in engine.moe_layers.values():
        adapter.layer.router.register_forward_hook(lambda _m, _in, out: routed.append(out.counts_E))
    S, B = config.data.seq_length, config.train.micro_batch_size
    generator = torch.Generator().manual_seed(engine.dp_rank)

    def batches():
        for _ in range(engine.num_microbatches):
            tokens = torch.randint(0, config.model.vocab_size, (B, S + 1), generator=generator)
            yield {
                "tokens_BS": tokens[:, :-1].contiguous(),
                "labels_BS": tokens[:, 1:].contiguous(),
                "loss_mask_BS": torch.ones(B, S),
                "position_ids_BS": torch.arange(S).expand(B, S),
            }

    try:
        engine.train_step(batches(), 1e-3)
        routed.clear()
        with SentBytes() as sent, patch("moe.model.sdpa.causal_lower_right", outside_modes):
            engine.train_step(batches(), 1e-3)
            StopRequest().agreed(engine.torch_device)
        dist.barrier()
        ranks, rank = config.parallel.ep, parallel_state.get_expert_model_parallel_rank()
        counts_E = torch.stack(routed).sum(dim=0) if routed else torch.zeros(ranks)
        pairs = int(counts_E.sum())
        return dict(sent.by_cause), (pairs - int(counts_E.chunk(ranks)[rank].sum()), pairs)
    finally:
        engine.close()


def outside_modes(*sizes: int) -> torch.Tensor:
    """torch makes this subclass of Tensor under no dispatch mode, which is how SentBytes counts."""
    with _disable_current_modes():
        return causal_lower_right(*sizes)


def job_of(overrides: tuple[str, ...], ranks: int) -> Job:
    return make_job(load_plan_config(QUICKSTART, overrides), ranks, GPUS["h100"])


@pytest.fixture(scope="module")
def pool(start_ranks: Any) -> RankPool:
    ranks: RankPool = start_ranks(4, init_process_group=False)
    return ranks


def check(pool: RankPool, ranks: int, *overrides: str) -> float:
    """Compare cause by cause, as means over the ranks of each stage; returns the mean of all."""
    layout = dict(word.split("=") for word in overrides if word.startswith("parallel."))
    model_ranks = 1
    for axis in ("tp", "pp", "cp"):
        model_ranks *= int(layout.get(f"parallel.{axis}", 1))
    batch = f"train.global_batch_size={PER_RANK * ranks // model_ranks}"
    settings = (*SIZES, batch, *overrides)
    job, measured = job_of(settings, ranks), pool.run(step_on_rank, settings, num_ranks=ranks)
    in_stage = ranks // job.layout.pp
    for stage in range(job.layout.pp):
        of_ranks = measured[stage * in_stage : (stage + 1) * in_stage]
        away, pairs = (sum(routed[i] for _, routed in of_ranks) for i in (0, 1))
        expected = bytes_sent(job, stage, away=away / pairs if pairs else None)
        found = {cause: mean(sent.get(cause, 0.0) for sent, _ in of_ranks) for cause in expected.parts}
        for cause, sent in expected.parts.items():
            slack = 1e-3 * expected.total  # control is hundreds of bytes
            assert found[cause] == pytest.approx(sent, rel=TOLERANCE, abs=slack), f"{cause} of stage {stage}"
        assert sum(found.values()) == pytest.approx(expected.total, rel=TOLERANCE)
    return mean(sum(sent.values()) for sent, _ in measured)


def test_weak_scaling(pool: RankPool) -> None:
    """Experts over all ranks, the batch in proportion to them."""
    sent = [check(pool, ranks, f"parallel.ep={ranks}") for ranks in (1, 2, 4)]
    assert sent[0] == 0
    assert sent[0] < sent[1] < sent[2]


def test_weak_scaling_of_muon(pool: RankPool) -> None:
    """Its momenta are gathered whole: bytes grow as (n - 1) / n."""
    sent = [check(pool, ranks, "optim.name=muon") for ranks in (1, 2, 4)]
    assert sent[0] == 0
    assert sent[2] / sent[1] == pytest.approx(3 / 2, rel=0.05)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ("parallel.tp=2",)),
        (4, ("parallel.tp=2", "parallel.ep=2", "train.precision=bf16")),
        (4, ("parallel.pp=2", "parallel.ep=2")),
        (2, ("parallel.tp=2", *MLA)),
        (2, ("parallel.tp=2", "model.mtp_layers=1")),
        (2, ("parallel.pp=2", "model.tie_embeddings=true")),
        (2, ("parallel.cp=2",)),
        (4, ("parallel.cp=2", "parallel.tp=2", *MLA)),
        (4, ("parallel.etp=2", "parallel.ep=2", "parallel.tp=2", "train.precision=bf16")),
        (2, ("parallel.etp=2", "train.recompute=full")),
        (4, ("parallel.tp=2", "parallel.ep=2", "train.precision=bf16", "optim.name=muon")),
        (4, ("parallel.pp=2", "parallel.etp=2", *MLA, "optim.name=muon")),
    ],
    ids=[
        "tp",
        "tp ep bf16",
        "pp ep",
        "tp mla",
        "tp mtp",
        "pp tied",
        "cp",
        "cp tp mla",
        "etp ep tp",
        "etp",
        "muon tp ep",
        "muon pp etp mla",
    ],
)
def test_layouts(pool: RankPool, ranks: int, overrides: tuple[str, ...]) -> None:
    check(pool, ranks, *overrides)
