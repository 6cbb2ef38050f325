"""Router losses in float64 against their written equations; the bias rule; the attached loss."""

from __future__ import annotations

import pytest
import torch
from dense_oracle import balance_loss, z_loss
from tolerances import assert_close

from moe.kernels.topk_route import RouteSums, topk_route, topk_route_with_sums
from moe.layer import BalanceSettings, Routing, attach_loss, router_losses, updated_bias

pytestmark = pytest.mark.usefixtures("poison_empty")


def make_logits(S: int, B: int, E: int) -> torch.Tensor:
    """float64, and they lean to the low experts, so that no loss is at its minimum."""
    generator = torch.Generator().manual_seed(S * B * E)
    logits_SBE = torch.randn(S, B, E, generator=generator, dtype=torch.float64)
    return (logits_SBE - torch.arange(E) / E).requires_grad_()


def make_routing(
    logits_SBE: torch.Tensor, K: int, settings: BalanceSettings, score: str = "softmax"
) -> Routing:
    """What the router gives to the losses."""
    num_sequences = settings.num_sequences(logits_SBE.shape[1])
    if num_sequences == 0:
        return Routing(*topk_route(logits_SBE.flatten(0, 1), K, score=score))
    ids_TK, weights_TK, sums = topk_route_with_sums(
        logits_SBE.flatten(0, 1), K, num_sequences=num_sequences, score=score
    )
    return Routing(ids_TK, weights_TK, sums.counts_BE.sum(dim=0), sums)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", [(1, 1, 3, 1), (7, 3, 5, 2), (63, 1, 16, 3), (4, 2, 3, 3)], ids=str)
def test_losses_equal_their_equations(size, score, scope):
    S, B, E, K = size
    logits_SBE, settings = make_logits(S, B, E), BalanceSettings(scope, 0.7, 0.2)
    routing = make_routing(logits_SBE, K, settings, score)
    ids_SBK = routing.ids_TK.view(S, B, K)
    losses = router_losses(routing, settings)
    expected_balance = 0.7 * balance_loss(logits_SBE, ids_SBK, scope=scope, score=score)
    expected_z = 0.2 * z_loss(logits_SBE)
    assert_close("balance", losses.balance, expected_balance)
    assert_close("z", losses.z, expected_z)
    assert_close("total", losses.total, expected_balance + expected_z)
    for name, actual, expected in (
        ("balance", losses.balance, expected_balance),
        ("z", losses.z, expected_z),
    ):
        (actual_grad,) = torch.autograd.grad(actual, logits_SBE, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(expected, logits_SBE, retain_graph=True)
        # Every score of a token is a share of one whole: with K = E the terms of the gradient cancel.
        assert_close(f"{name}: logits.grad", actual_grad, expected_grad, scale=1.0)


def test_scopes_differ_where_sequences_differ():
    of_scope = {}
    for settings in (BalanceSettings("sequence", 1.0), BalanceSettings("batch", 1.0)):
        routing = make_routing(make_logits(7, 3, 5), 2, settings)
        of_scope[settings.aux_loss] = router_losses(routing, settings).balance
    assert of_scope["sequence"] > of_scope["batch"]


def test_perfect_balance_costs_the_coefficient():
    ids_TK = torch.arange(12).remainder(4).view(6, 2)
    sums = RouteSums(torch.full((1, 4), 3), torch.full((1, 4), 1.5), torch.zeros(1))
    routing = Routing(ids_TK, torch.full((6, 2), 0.5), torch.full((4,), 3), sums)
    losses = router_losses(routing, BalanceSettings("sequence", 0.3))
    assert_close("balance", losses.balance, torch.tensor(0.3))


@pytest.mark.parametrize(
    "settings", [BalanceSettings(), BalanceSettings("batch", 0.0, 0.0), BalanceSettings("none", 1.0, 0.0)]
)
def test_losses_that_are_off_are_zero_without_a_graph(settings):
    routing = make_routing(make_logits(7, 3, 5), 2, settings)
    losses = router_losses(routing, settings)
    assert routing.sums is None
    for loss in (losses.balance, losses.z, losses.total):
        assert loss.eq(0) and loss.shape == () and not loss.requires_grad


def test_losses_without_sums_are_refused():
    routing = make_routing(make_logits(7, 3, 5), 2, BalanceSettings())
    with pytest.raises(ValueError, match="give the router num_sequences"):
        router_losses(routing, BalanceSettings("batch", 0.1))


def test_an_unknown_scope_is_refused():
    with pytest.raises(
        ValueError, match="aux_loss='world' is unknown; allowed: none, sequence, batch, global"
    ):
        BalanceSettings("world", 0.1)


def test_bias_moves_towards_balance():
    bias_E = torch.tensor([0.5, 0.0, -0.25, 0.0])
    counts_E = torch.tensor([10, 2, 6, 6])  # their mean is 6
    assert_close("bias", updated_bias(bias_E, counts_E, 0.125), torch.tensor([0.375, 0.125, -0.25, 0.0]))
    assert bias_E.tolist() == [0.5, 0.0, -0.25, 0.0]
    both_LE = updated_bias(bias_E.repeat(2, 1), torch.stack([counts_E, counts_E.flip(0) * 100]), 0.125)
    assert_close("layers", both_LE, torch.tensor([[0.375, 0.125, -0.25, 0.0], [0.5, 0.0, -0.125, -0.125]]))


def test_bias_rule_balances_a_skewed_router():
    generator = torch.Generator().manual_seed(5)
    logits_TE = torch.randn(512, 8, generator=generator) + torch.linspace(1.5, -1.5, 8)
    bias_E, loads = torch.zeros(8), []
    for _ in range(200):
        counts_E = topk_route(logits_TE, 2, score="sigmoid", bias_E=bias_E)[2]
        loads.append(float(counts_E.max() / counts_E.float().mean()))
        bias_E = updated_bias(bias_E, counts_E, 0.01)
    assert loads[0] > 2 and max(loads[-10:]) < 1.2


def test_attached_loss_adds_its_gradient_and_changes_no_value():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    loss = (w * w).sum() * 0.5
    y = attach_loss(x * 2, loss)
    assert torch.equal(y, x * 2)
    (y * torch.tensor([10.0, 20.0])).sum().backward()
    assert x.grad.tolist() == [20.0, 40.0]
    assert w.grad.tolist() == [3.0, 4.0]  # that of the loss, whatever the gradient of y


def test_attached_loss_without_a_graph_is_harmless():
    x = torch.ones(2, requires_grad=True)
    attach_loss(x * 2, torch.zeros(())).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]
