"""The layer under PyTorch's own data parallelism: two ranks equal one process with all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tolerances import assert_close
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from moe.layer import MoEConfig, MoELayer

D, F, E, K = 16, 24, 6, 2
Named = dict[str, torch.Tensor]


class Block(nn.Module):
    """The layer between two other parameters, its loss added: a model as users write it."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.before = nn.Linear(D, D)
        self.layer = layer
        self.after = nn.Linear(D, 1)

    def forward(self, x_SBD: torch.Tensor) -> torch.Tensor:
        output = self.layer(self.before(x_SBD))
        return self.after(output.y).square().mean() + output.losses.total


def make_block() -> Block:
    torch.manual_seed(0)
    config = MoEConfig(
        hidden_size=D,
        num_experts=E,
        top_k=K,
        expert_hidden_size=F,
        shared_expert_hidden_size=8,
        renormalize=True,
        aux_loss="sequence",
        aux_loss_coeff=0.1,
        z_loss_coeff=0.01,
        init_std=0.3,
    )
    return Block(MoELayer(config))


def tokens(rank: int) -> torch.Tensor:
    return torch.randn(7, 2, D, generator=torch.Generator().manual_seed(rank))


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def results(block: nn.Module, x_SBD: torch.Tensor) -> Named:
    """The loss and every gradient."""
    loss = block(x_SBD)
    loss.backward()
    grads = {name.removeprefix("module."): whole(p.grad) for name, p in block.named_parameters()}
    return {"loss": loss.detach(), **grads}


def ddp_on_rank() -> Named:
    return results(DistributedDataParallel(make_block()), tokens(dist.get_rank()))


def fsdp_on_rank() -> Named:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    block = make_block()
    fully_shard(block.layer.experts, mesh=mesh)
    fully_shard(block, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in block.parameters())
    return results(block, tokens(dist.get_rank()))


@pytest.mark.parametrize("on_rank", [ddp_on_rank, fsdp_on_rank])
def test_two_ranks_equal_one_process(start_ranks, on_rank):
    expected = [results(make_block(), tokens(rank)) for rank in range(2)]
    for rank, actual in enumerate(start_ranks(2).run(on_rank)):
        assert_close("loss", actual.pop("loss"), expected[rank]["loss"])
        assert actual.keys() == expected[rank].keys() - {"loss"}
        for name, gradient in actual.items():
            mean = (expected[0][name] + expected[1][name]) / 2
            assert_close(f"{name}.grad of rank {rank}", gradient, mean)
