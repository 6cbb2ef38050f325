"""Two ranks that each hold half of every sequence: their losses and router gradients add up to the whole."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from gradients import gradients
from tolerances import assert_close

from moe.layer import MoEConfig, MoELayer

S, B, D, E, K = 10, 3, 16, 6, 2


def make_layer(scope: str, score: str, sequence_group: dist.ProcessGroup | None = None) -> MoELayer:
    torch.manual_seed(0)
    config = MoEConfig(
        hidden_size=D,
        num_experts=E,
        top_k=K,
        expert_hidden_size=8,
        score=score,
        aux_loss=scope,
        aux_loss_coeff=0.3,
        z_loss_coeff=0.01,
    )
    layer = MoELayer(config, sequence_group=sequence_group)
    layer.router.reset_parameters(std=0.5)
    layer.experts.reset_parameters(std=0.2)
    return layer


def losses_of(layer: MoELayer, x_SBD: torch.Tensor) -> dict[str, torch.Tensor]:
    """Both losses, the output, and the gradients of the losses."""
    x_SBD = x_SBD.clone().requires_grad_()
    output = layer(x_SBD)
    total = output.losses.total
    grads = gradients(total, torch.ones_like(total), x=x_SBD, router=layer.router.weight_ED)
    return {
        "balance": output.losses.balance.detach(),
        "z": output.losses.z.detach(),
        "y": output.y.detach(),
        **grads,
    }


def losses_on_rank(x_SBD: torch.Tensor, scope: str, score: str) -> dict[str, torch.Tensor]:
    half = x_SBD.chunk(dist.get_world_size())[dist.get_rank()]
    return losses_of(make_layer(scope, score, dist.group.WORLD), half)


@pytest.fixture(scope="module")
def ranks(start_ranks):
    return start_ranks(2)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_shares_of_two_ranks_add_up(ranks, scope, score):
    # A trend along the sequence: the halves are routed differently, so local counts would give another loss.
    x_SBD = torch.randn(S, B, D, generator=torch.Generator().manual_seed(0))
    x_SBD = x_SBD + torch.linspace(-2, 2, S)[:, None, None]
    first, second = ranks.run(losses_on_rank, x_SBD, scope, score)
    whole = losses_of(make_layer(scope, score), x_SBD)
    for name in ("balance", "z", "router"):
        assert_close(f"sum of {name}", first[name] + second[name], whole[name])
    for name in ("y", "x"):
        assert_close(name, torch.cat([first[name], second[name]]), whole[name])
    alone = [losses_of(make_layer(scope, score), half)["balance"] / 2 for half in x_SBD.chunk(2)]
    assert abs(sum(alone) - whole["balance"]) > 0.01 * whole["balance"], "the group would not matter here"
