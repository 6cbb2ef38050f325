"""What a config may say beside sizes: capacity, jitter, biases, activations, order of axes; refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from gradients import gradients
from tolerances import LARGEST_DIFFERENCE, assert_close, difference

from moe.kernels.expert_mlp.reference import expert_mlp_reference
from moe.kernels.permute_index import permute_index
from moe.layer import MoEConfig, MoELayer

pytestmark = pytest.mark.usefixtures("poison_empty")

D, F, E, K = 16, 24, 6, 2
PLAIN = MoEConfig(hidden_size=D, num_experts=E, top_k=K, expert_hidden_size=F, init_std=0.3)


def make_layer(**settings: object) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(replace(PLAIN, **settings))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if ".b_" in name:
                parameter.normal_(std=0.5)
    return layer


def test_weights_are_drawn_by_the_seed():
    first, second = make_layer(shared_expert_hidden_size=8), make_layer(shared_expert_hidden_size=8)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
        assert 0.2 < parameter.std() < 0.4, name


def test_a_capacity_drops_the_least_of_the_hot_expert_and_counts():
    layer, dropless = make_layer(capacity_factor=1.0), make_layer()
    for each in (layer, dropless):
        each.router.bias_E.copy_(torch.tensor([9.0, 0, 0, 0, 0, 0]))  # every token goes to expert 0
    x_SBD = torch.randn(6, 3, D, requires_grad=True)
    output, full = layer(x_SBD), dropless(x_SBD)
    assert full.num_dropped == 0 and full.counts_E[0] == 18
    assert output.counts_E.max() <= 6 == output.counts_E[0]  # 18 tokens x 2 / 6
    assert output.num_dropped == 36 - output.counts_E.sum() >= 12
    output.y.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    unchanged = (output.y == full.y).all(dim=-1)
    assert unchanged.any() and not unchanged.all()


def test_jitter_acts_in_training_only():
    layer, x_SBD = make_layer(jitter=0.5), torch.randn(6, 3, D)
    with torch.no_grad():
        assert not torch.equal(layer(x_SBD).y, layer(x_SBD).y)
        layer.eval()
        assert torch.equal(layer(x_SBD).y, make_layer()(x_SBD).y)


def test_batch_first_is_the_transpose():
    x_SBD = torch.randn(7, 3, D)
    settings = {"aux_loss": "sequence", "aux_loss_coeff": 0.3, "shared_expert_hidden_size": 8}
    expected = make_layer(**settings)(x_SBD)
    output = make_layer(**settings, batch_first=True)(x_SBD.transpose(0, 1).contiguous())
    assert_close("y", output.y, expected.y.transpose(0, 1))
    assert torch.equal(output.losses.balance, expected.losses.balance)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "clamped_swiglu"])
def test_activations_and_biases(activation):
    layer = make_layer(activation=activation, expert_bias=True, logit_bias=True)
    parameters = dict(layer.named_parameters())
    assert {"router.b_E", "experts.b_gate_up_eG", "experts.b_down_eD"} < parameters.keys()
    wide = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    x_SBD = torch.randn(7, 3, D, requires_grad=True)
    x_TD = x_SBD.detach().flatten(0, 1).double().requires_grad_()
    probs_TE = (x_TD @ wide["router.weight_ED"].T + wide["router.b_E"]).softmax(dim=1)
    ids_TK = layer.router(x_SBD.flatten(0, 1)).ids_TK
    expected_TD = expert_mlp_reference(
        x_TD,
        wide["experts.w_gate_up_eGD"],
        wide["experts.w_down_eDF"],
        probs_TE.gather(1, ids_TK),
        permute_index(ids_TK.flatten(), E),
        activation=activation,
        biases=(wide["experts.b_gate_up_eG"], wide["experts.b_down_eD"]),
    )
    y_SBD = layer(x_SBD).y
    assert_close("y", y_SBD.flatten(0, 1), expected_TD)
    cotangent = torch.randn(y_SBD.shape)
    actual = gradients(y_SBD, cotangent, x=x_SBD, **parameters)
    for name, grad in gradients(expected_TD, cotangent.flatten(0, 1).double(), x=x_TD, **wide).items():
        assert_close(f"{name}.grad", actual[name].view(grad.shape), grad)


def test_a_layer_that_stores_in_8_bits_trains_as_well():
    sizes = {"expert_hidden_size": 128, "precision": "fp8"}
    x_SBD, target_SBD = torch.randn(2, 16, 4, D).unbind()
    losses, saved_bytes = {}, {}
    for stores in (False, True):
        layer = make_layer(fp8_input_store=stores, **sizes)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        saved: dict[int, int] = {}
        for _ in range(60):
            with torch.autograd.graph.saved_tensors_hooks(partial(note_bytes, saved), lambda t: t):
                loss = (layer(x_SBD).y - target_SBD).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            saved_bytes[stores] = sum(saved.values())
            saved.clear()
        losses[stores] = loss.item()
    pairs, G = 16 * 4 * K, 256
    assert saved_bytes[False] - saved_bytes[True] == pairs * G * 4 - pairs * (G + G // 128 * 4)
    assert losses[False] < 0.01 and losses[True] < 0.015, losses  # it begins above 1


def test_with_wide_products_into_the_activation_a_layer_errs_as_one_product_may():
    results = []
    for settings in ({}, {"precision": "fp8", "wide_into_activation": True}):
        layer = make_layer(expert_hidden_size=128, **settings)
        x_SBD = torch.randn(16, 8, D, requires_grad=True)
        y_SBD = layer(x_SBD).y
        experts = dict(layer.experts.named_parameters())
        results.append({"y": y_SBD} | gradients(y_SBD, torch.randn(y_SBD.shape), x=x_SBD, **experts))
    exact, rounded = results
    for name, tensor in rounded.items():
        differs = difference(tensor, exact[name])
        assert LARGEST_DIFFERENCE[torch.bfloat16] < differs < LARGEST_DIFFERENCE[torch.float8_e4m3fn], name


def note_bytes(saved: dict[int, int], tensor: torch.Tensor) -> torch.Tensor:
    saved[tensor.data_ptr()] = tensor.nbytes
    return tensor


def global_losses_on_rank(shards: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    layer = make_layer(aux_loss="global", aux_loss_coeff=0.3)
    layer.balance_group = dist.group.WORLD
    loss = layer(shards[dist.get_rank()]).losses.balance
    (grad,) = torch.autograd.grad(loss, layer.router.weight_ED)
    return loss.detach(), grad


def test_the_global_balance_loss_is_the_mean_over_ranks_of_one_batch(start_ranks):
    x_SBD = torch.randn(10, 4, D) + torch.linspace(-2, 2, 4)[:, None]
    results = start_ranks(2).run(global_losses_on_rank, list(x_SBD.split(2, dim=1)))
    whole = make_layer(aux_loss="batch", aux_loss_coeff=0.3)
    loss = whole(x_SBD).losses.balance
    (grad,) = torch.autograd.grad(loss, whole.router.weight_ED)
    for name, index, expected in (("loss", 0, loss), ("grad", 1, grad)):
        assert_close(name, torch.stack([result[index] for result in results]).mean(dim=0), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "relu"}, "activation='relu' is unknown; allowed: swiglu, geglu, clamped_swiglu"),
        ({"fp8_input_store": True}, "fp8_input_store needs a precision of fp8, .*, mxfp8, got 'wide'"),
        ({"wide_into_activation": True}, "wide_into_activation needs a precision of fp8, .*, got 'wide'"),
        (
            {"precision": "fp8", "fp8_input_store": True, "wide_into_activation": True},
            "fp8_input_store rounds what wide_into_activation keeps wide",
        ),
        ({"precision": "fp8", "expert_bias": True}, "precision='fp8' takes .*, got 'swiglu' and True"),
        ({"precision": "mxfp8", "activation": "geglu"}, "precision='mxfp8' takes .*, got 'geglu' and False"),
        ({"precision": "int4"}, "precision='int4' is unknown; allowed: wide, fp8, fp8_power_of_two, mxfp8"),
        ({"score": "tanh", "backend": "cuda"}, "score='tanh' .*; backend='cuda' is unknown; allowed: auto"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"top_k": 7}, "top_k=7 is more than num_experts=6"),
        ({"num_groups": 4}, "num_groups=4 does not divide num_experts=6"),
        ({"num_groups": 3, "top_groups": 4}, "top_groups=4 must be between 1 and num_groups=3"),
        ({"jitter": 1.0}, r"jitter=1.0 must be in \[0, 1\)"),
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0 must be 0 or more"),
        ({"score": "sigmoid", "score_before_topk": False}, "needs score_before_topk=True"),
    ],
)
def test_every_problem_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **settings)


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 7), (1, 2, 5, 8)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_an_input_of_another_shape_is_named(shape, batch_first):
    config = MoEConfig(hidden_size=8, num_experts=4, top_k=2, expert_hidden_size=4, batch_first=batch_first)
    axes = "batch, sequence" if batch_first else "sequence, batch"
    with pytest.raises(ValueError, match=re.escape(f"[{axes}, hidden_size=8], it is {list(shape)}")):
        MoELayer(config)(torch.zeros(shape))
