"""What only a GPU can show of the expert path: no wait for the host, CUDA graphs, more than 2**31 numbers."""

from __future__ import annotations

import pytest
import torch
from routed_pairs import some_ids
from tolerances import assert_close
from torch import Tensor

from moe.kernels.expert_mlp import expert_mlp
from moe.kernels.permute_index import permute_index
from moe.layer import MoEConfig, MoELayer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

T, D, F, E, K = 300, 64, 96, 8, 2


def make_layer() -> torch.nn.Module:
    torch.manual_seed(0)
    config = MoEConfig(
        hidden_size=D,
        num_experts=E,
        top_k=K,
        expert_hidden_size=F,
        aux_loss="sequence",
        aux_loss_coeff=0.1,
        z_loss_coeff=0.1,
        rounding="nearest",
        tile_rows=16,
        init_std=0.1,
    )
    return MoELayer(config, dtype=torch.bfloat16, device="cuda")


def make_batch() -> Tensor:
    return torch.randn(T, 1, D, device="cuda", dtype=torch.bfloat16)


def test_never_waits_for_the_host():
    layer, x_SBD = make_layer(), make_batch()
    layer(x_SBD).y.sum().backward()  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x_SBD).y.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


class OnlyY(torch.nn.Module):
    """The layer as a function of one tensor to one tensor."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_SBD: Tensor) -> Tensor:
        return self.layer(x_SBD).y


def test_a_cuda_graph_replays_forward_and_backward():
    layer = OnlyY(make_layer())
    graphed = torch.cuda.make_graphed_callables(OnlyY(layer.layer), (make_batch().requires_grad_(),))
    for seed in range(2):  # other tokens, other routes, the same graph
        torch.manual_seed(seed)
        x_SBD = make_batch()
        results = []
        for forward in (graphed, layer):
            leaf = x_SBD.clone().requires_grad_()
            y_SBD = forward(leaf)
            grads = torch.autograd.grad(y_SBD.sum(), [leaf, *layer.parameters()])
            results.append([y_SBD.detach().clone(), *(grad.clone() for grad in grads)])
        names = ("y", "x", *(name for name, _ in layer.named_parameters()))
        for name, replayed, eager in zip(names, *results, strict=True):
            assert torch.equal(replayed, eager), name


def test_more_numbers_than_32_bits_count():
    # H has 2**32 numbers; the last rows must be as right as the first.
    num_tokens, hidden = 2**20, 1024
    ids_TK = some_ids(1024, E, K).repeat(num_tokens // 1024, 1).cuda()
    index = permute_index(ids_TK.flatten(), E)
    x_TD = torch.randn(1024, 16, device="cuda", dtype=torch.bfloat16).repeat(num_tokens // 1024, 1)
    gate_up = torch.randn(E, 2 * hidden, 16, device="cuda", dtype=torch.bfloat16) / 4
    down = torch.randn(E, 16, hidden, device="cuda", dtype=torch.bfloat16) / 32
    weights_TK = torch.ones(num_tokens, K, device="cuda")
    x_TD.requires_grad_()
    y_TD = expert_mlp(x_TD, gate_up, down, weights_TK, index)
    (grad_TD,) = torch.autograd.grad(y_TD.sum(), x_TD)
    # The same tokens with the same experts, so each block of 1024 is the first one.
    for name, tensor in (("y", y_TD), ("x.grad", grad_TD)):
        blocks = tensor.detach().unflatten(0, (-1, 1024))
        assert_close(f"last block of {name}", blocks[-1], blocks[0].float())
        assert blocks[0].any()
