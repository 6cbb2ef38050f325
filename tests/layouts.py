"""Layouts of small models, and what a run in one of them leaves: the material of the matrix tests.

A rank of a job runs `train_in`. Every layout trains one of MODELS from the same seed over the same batches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from moe.config import RunConfig, load_config

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
STEPS = 3

# Every part of a model that a layout could break, as small as it may be split over eight ranks.
SIZES = (
    "model.num_layers=5",
    "model.num_dense_layers=1",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.vocab_size=96",
    "model.num_experts=8",
    "model.expert_hidden_size=16",
    "model.shared_expert_hidden_size=24",
    "model.attention.num_heads=4",
    "model.attention.num_query_groups=4",
    "model.attention.head_dim=8",
    "data.seq_length=32",
    "train.global_batch_size=8",
    "train.micro_batch_size=1",
    "train.eval_sequences=8",
    "checkpoint.interval=0",
)
WINDOWS = (
    "model.attention.num_query_groups=2",
    "model.attention.qk_norm=full",
    "model.attention.qkv_bias=true",
    "model.attention.sinks=true",
    "model.attention.sliding_window=5",
    "model.attention.full_attention_every=2",
)
MLA = (
    "model.num_dense_layers=2",
    "model.attention.kind=mla",
    "model.attention.num_query_groups=0",
    "model.attention.q_lora_rank=20",
    "model.attention.kv_lora_rank=12",
    "model.attention.qk_nope_head_dim=8",
    "model.attention.qk_rope_head_dim=4",
    "model.attention.v_head_dim=6",
)
MODELS = {
    "gqa": (),
    "windows and sinks": WINDOWS,
    "mla": MLA,
    "mla, mtp": (*MLA, "model.mtp_layers=1", "model.mtp_loss_coeff=0.3"),
    "tied": ("model.tie_embeddings=true", "model.shared_expert_hidden_size=0"),
    "biased experts": (
        "model.expert_activation=clamped_swiglu",
        "model.expert_bias=true",
        "model.router.logit_bias=true",
    ),
    # Its balance is that of a micro-batch of all ranks: each layout of this model has two of them.
    "global loss": ("model.router.aux_loss=global", "model.router.z_loss_coeff=1e-3"),
}


@dataclass(frozen=True)
class Layout:
    """How many ranks train which model, and the keys of `parallel` and `train` that say how."""

    model: str
    num_ranks: int
    keys: str = ""  # "tp=2 vpp=2 recompute=full"
    fast: bool = False  # in the suite that every commit runs

    @property
    def name(self) -> str:
        """As in test ids and in the table."""
        return f"{self.model}: {self.num_ranks} {self.keys}".strip()

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of the config."""
        pairs = (key.split("=") for key in self.keys.split())
        sections = {"recompute": "train", "micro_batch_size": "train", "precision": "train"}
        return tuple(f"{sections.get(key, 'parallel')}.{key}={value}" for key, value in pairs)


OVERLAP = "overlap_grad_reduce=true overlap_param_gather=true"
LAYOUTS = [
    Layout("gqa", 2, "tp=2"),
    Layout("gqa", 2, "ep=2 overlap_grad_reduce=true"),
    Layout("gqa", 2, f"cp=2 ep=2 {OVERLAP}", fast=True),
    Layout("gqa", 4, "tp=2 cp=2 ep=4 recompute=selective", fast=True),
    Layout("gqa", 4, f"ep=2 recompute=full {OVERLAP}", fast=True),
    Layout("gqa", 4, "pp=2 ep=2 stage_layers=[3,2]"),
    Layout("gqa", 4, "pp=4 stage_layers=[1,2,2,0]"),
    Layout("gqa", 4, f"pp=2 vpp=2 ep=2 {OVERLAP}", fast=True),
    Layout("gqa", 4, "cp=4 ep=2"),
    Layout("gqa", 4, f"tp=4 ep=4 {OVERLAP}"),
    Layout("gqa", 8, "tp=2 pp=2 ep=4 recompute=full"),
    Layout("gqa", 8, "tp=2 pp=2 cp=2 ep=4 vpp=2"),
    Layout("gqa", 8, f"pp=2 cp=2 ep=2 vpp=2 {OVERLAP}"),
    Layout("gqa", 8, f"ep=8 recompute=selective {OVERLAP}"),
    Layout("gqa", 8, "pp=4 ep=2 stage_layers=[1,2,1,1]"),
    Layout("windows and sinks", 2, "cp=2"),
    Layout("windows and sinks", 4, f"tp=2 cp=2 ep=2 {OVERLAP}", fast=True),
    Layout("windows and sinks", 4, "cp=4 recompute=selective"),
    Layout("windows and sinks", 8, "tp=2 cp=2 pp=2 ep=4 recompute=full"),
    Layout("mla", 2, "pp=2 vpp=2 stage_layers=[0,3,1,1]"),
    Layout("mla", 4, "tp=2 cp=2 ep=2 recompute=full"),
    Layout("mla", 4, f"tp=4 ep=2 recompute=selective {OVERLAP}"),
    Layout("mla", 8, "tp=2 cp=4 ep=8 recompute=selective"),
    Layout("mla, mtp", 2, "pp=2 vpp=2 recompute=full"),
    Layout("mla, mtp", 4, "pp=2 vpp=2 cp=2 ep=2 stage_layers=[2,1,1,1]", fast=True),
    Layout("mla, mtp", 4, f"tp=2 pp=2 ep=2 stage_layers=[4,1] recompute=selective {OVERLAP}", fast=True),
    Layout("mla, mtp", 4, f"cp=4 ep=4 {OVERLAP}"),
    Layout("mla, mtp", 8, "tp=2 pp=2 cp=2 ep=2 recompute=full"),
    Layout("mla, mtp", 8, f"pp=4 ep=2 vpp=2 stage_layers=[0,1,1,1,1,1,0,0] {OVERLAP}"),
    Layout("mla, mtp", 8, "tp=2 ep=4 micro_batch_size=2"),
    Layout("tied", 4, f"pp=2 ep=2 vpp=2 {OVERLAP}"),
    Layout("tied", 4, "tp=2 cp=2 ep=2"),
    Layout("tied", 8, "pp=4 cp=2 ep=2 recompute=full"),
    Layout("global loss", 4, "cp=2 ep=4", fast=True),
    Layout("global loss", 8, "tp=2 cp=2 ep=2 recompute=full"),
    Layout("global loss", 8, "pp=2 tp=2 ep=2 vpp=2"),
    Layout("gqa", 2, "etp=2"),
    Layout("gqa", 2, "tp=2 etp=2"),
    Layout("biased experts", 4, f"tp=2 ep=2 etp=2 recompute=selective {OVERLAP}", fast=True),
    Layout("biased experts", 8, "pp=2 ep=2 etp=2"),
    Layout("gqa", 4, f"pp=2 vpp=2 etp=2 {OVERLAP}"),
    Layout("mla, mtp", 4, "pp=2 etp=2 stage_layers=[4,1] recompute=full"),
    Layout("tied", 4, "cp=2 ep=2 etp=2"),
    Layout("gqa", 4, "ep=2 etp=2 dispatcher=hierarchical ranks_per_node=2 overlap_shared_expert=true"),
    Layout("global loss", 8, "tp=4 ep=2 etp=4"),
    Layout("mla", 8, f"tp=2 cp=2 pp=2 ep=2 etp=2 {OVERLAP}"),
    Layout("gqa", 8, f"tp=2 ep=2 etp=2 {OVERLAP}"),
]


def one_rank(model: str) -> Layout:
    """What every layout of a model is compared with."""
    return Layout(model, 1, "micro_batch_size=2" if model == "global loss" else "")


def config_of(layout: Layout) -> RunConfig:
    overrides = [*SIZES, *MODELS[layout.model], "train.precision=fp32", *layout.overrides]
    return load_config(QUICKSTART, overrides, world_size=layout.num_ranks)


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


def engine_with_small_buckets(config: RunConfig) -> Any:
    """Where communication overlaps, so small that the model fills several, as a large one does."""
    from moe.engine import megatron

    whole = megatron._ddp_config
    small = patch.object(megatron, "_ddp_config", lambda parallel: replace(whole(parallel), bucket_size=2000))
    with small:
        engine = megatron.MegatronEngine(config)
    if config.parallel.overlap_grad_reduce and config.parallel.pp == 1:  # later stages have one bucket each
        assert all(len(buffer.buckets) > 1 for buffer in engine.ddps[0].buffers[:1])
    return engine


def train_in(
    layout: Layout, steps: int, save_to: Path | None = None, load_from: Path | None = None
) -> dict[str, Any]:
    """On one rank of a job: train, and tell what every rank should agree on.

    Args:
        layout: of the job.
        steps: to take.
        save_to: where the checkpoint `step_...` is written at the end.
        load_from: a checkpoint to begin with, after STEPS steps.
    """
    from moe.checkpoint.save import save_checkpoint

    assert int(os.environ["WORLD_SIZE"]) == layout.num_ranks
    torch.set_num_threads(1)
    config = config_of(layout)
    engine = engine_with_small_buckets(config)
    try:
        first = 0
        if load_from is not None:
            first = STEPS
            engine.load_shards(load_from, first)
        results = [
            engine.train_step(batches(config, step, engine.dp_rank, engine.layout.dp), lr=3e-3)
            for step in range(first, first + steps)
        ]
        if save_to is not None:
            save_checkpoint(engine, save_to, first + steps, {}, keep=9)
        evaluated = engine.evaluate(
            batches(config, 999, engine.dp_rank, engine.layout.dp),
            engine.num_microbatches,
            torch.full((config.model.vocab_size,), 3),
        )
        return {
            "loss": [result.loss for result in results],
            "mtp_loss": [result.mtp_loss for result in results],
            "balance_loss": [result.balance_loss for result in results],
            "z_loss": [result.z_loss for result in results],
            "grad_norm": [result.grad_norm for result in results],
            "counts": [result.counts_LE.tolist() for result in results],
            "params_total": engine.params_total,
            "heldout_nll": evaluated.nll_nats,
            "heldout_tokens": evaluated.tokens,
        }
    finally:
        engine.close()
