"""`from moe import MoELayer` in a plain model under `deepspeed.initialize`, without our engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks_pool import RankPool
from torch import nn
from zero_runs import PRELOAD

from moe import MoEConfig, MoELayer

BATCH, LENGTH, WIDTH, STEPS = 4, 8, 16, 4


class Model(nn.Module):
    """A linear, the layer, a linear; the layer's balance loss is part of the loss."""

    def __init__(self) -> None:
        super().__init__()
        config = MoEConfig(
            hidden_size=WIDTH,
            num_experts=4,
            top_k=2,
            expert_hidden_size=16,
            shared_expert_hidden_size=16,
            aux_loss="sequence",
            aux_loss_coeff=1e-2,
            init_std=0.2,
            batch_first=True,
        )
        self.first = nn.Linear(WIDTH, WIDTH)
        self.experts = MoELayer(config)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BSD: torch.Tensor, target_BSD: torch.Tensor) -> torch.Tensor:
        output = self.experts(self.first(x_BSD))
        error = (self.last(output.y) - target_BSD).square().mean()
        return error + output.losses.total


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x_BSD = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(step))
    return x_BSD, x_BSD.flip(1).abs()


def curve_alone() -> list[float]:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        loss = model(*data(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def curve_under_deepspeed(stage: int) -> list[float]:
    """On one rank: its half of each batch."""
    import deepspeed

    # Without this, DeepSpeed compiles a C++ extension on the first start over gloo.
    deepspeed.ops.__compatible_ops__ = {}
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    half = BATCH // dist.get_world_size()
    settings = {
        "train_micro_batch_size_per_gpu": half,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    own = slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)
    losses = []
    for step in range(STEPS):
        x_BSD, target_BSD = data(step)
        loss = engine(x_BSD[own], target_BSD[own])
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    dist.barrier()
    deepspeed.comm.destroy_process_group()  # with what DeepSpeed remembers of it: the next job has another
    return losses


@pytest.fixture(scope="module")
def pool(start_ranks: Any) -> RankPool:
    ranks: RankPool = start_ranks(2, preload=PRELOAD)
    return ranks


@pytest.mark.parametrize("stage", [1, 2])
def test_layer_trains_as_in_one_process(pool: RankPool, stage: int) -> None:
    expected = curve_alone()
    assert expected[-1] < expected[0]
    for found in pool.run(curve_under_deepspeed, stage):
        assert found == pytest.approx(expected, rel=1e-5)
