"""A small model for tests of the optimizer, and its batches; imported by them as muon_runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from moe.config import RunConfig, load_config

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
SIZES = (
    "model.num_layers=2",
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
    "optim.name=muon",
)
MLA = [
    "model.attention.kind=mla",
    "model.attention.num_query_groups=0",
    "model.attention.q_lora_rank=12",
    "model.attention.kv_lora_rank=12",
    "model.attention.qk_nope_head_dim=8",
    "model.attention.qk_rope_head_dim=4",
    "model.attention.v_head_dim=6",
    "model.mtp_layers=1",
]


def config_of(overrides: list[str], world_size: int) -> RunConfig:
    return load_config(QUICKSTART, [*SIZES, *overrides], world_size=world_size)


def batches(config: RunConfig, step: int, dp_rank: int, dp_size: int) -> Iterator[dict[str, torch.Tensor]]:
    S, V, micro = config.data.seq_length, config.model.vocab_size, config.train.micro_batch_size
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, V, (config.train.global_batch_size, 1), generator=generator)
    tokens = (starts + torch.arange(S + 1)) % V
    for first in range(dp_rank * micro, len(tokens), dp_size * micro):
        part = tokens[first : first + micro]
        yield {
            "tokens_BS": part[:, :-1].contiguous(),
            "labels_BS": part[:, 1:].contiguous(),
            "loss_mask_BS": torch.ones(micro, S),
            "position_ids_BS": torch.arange(S).expand(micro, S),
        }
