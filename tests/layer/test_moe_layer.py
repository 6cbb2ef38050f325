"""MoELayer against a loop over tokens and experts in float64: output and every gradient by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from dense_oracle import balance_loss, dense_moe, z_loss
from gradients import gradients
from tolerances import assert_close

from moe.layer import MoEConfig, MoELayer, Routing
from moe.layer.router import gate

pytestmark = pytest.mark.usefixtures("poison_empty")

D, F = 16, 24
ROUTERS = {
    "softmax": {},
    "softmax_renormalized": {"renormalize": True},
    "softmax_after_topk": {"score_before_topk": False},
    "sigmoid": {"score": "sigmoid", "renormalize": True, "scale": 2.5},
    "sigmoid_groups": {"score": "sigmoid", "renormalize": True, "num_groups": 3, "top_groups": 1},
}


def make_layer(E=6, K=2, *, shared=True, dtype=torch.float32, **settings) -> MoELayer:
    torch.manual_seed(0)
    config = MoEConfig(
        hidden_size=D,
        num_experts=E,
        top_k=K,
        expert_hidden_size=F,
        shared_expert_hidden_size=8 if shared else 0,
        init_std=0.2,
        **settings,
    )
    layer = MoELayer(config, dtype=dtype)
    layer.router.reset_parameters(std=0.5)
    layer.router.bias_E.normal_(std=0.1)
    return layer


def check_against_the_oracle(layer: MoELayer, x_SBD: torch.Tensor) -> None:
    parameters = dict(layer.named_parameters())
    expected = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    expected_x_TD = x_SBD.detach().flatten(0, 1).double().requires_grad_()
    router = vars(layer.config) | {"bias_E": layer.router.bias_E.double()}
    y_SBD = layer(x_SBD).y
    expected_y_TD = dense_moe(expected_x_TD, expected, router)
    assert y_SBD.shape == x_SBD.shape and y_SBD.dtype == x_SBD.dtype
    assert_close("y", y_SBD.flatten(0, 1), expected_y_TD)
    cotangent_SBD = torch.randn(x_SBD.shape).to(x_SBD.dtype)
    actual_grads = gradients(y_SBD, cotangent_SBD, x=x_SBD, **parameters)
    expected_grads = gradients(expected_y_TD, cotangent_SBD.flatten(0, 1), x=expected_x_TD, **expected)
    expected_grads["x"] = expected_grads["x"].view(x_SBD.shape)
    for name, grad in actual_grads.items():
        assert_close(f"{name}.grad", grad, expected_grads[name], dtype=x_SBD.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_equals_the_dense_oracle(router, dtype):
    layer = make_layer(dtype=dtype, **router)
    check_against_the_oracle(layer, torch.randn(7, 3, D, dtype=dtype, requires_grad=True))


@pytest.mark.parametrize(
    ("S", "B", "E", "K", "shared"),
    [
        (1, 1, 6, 2, True),
        (1, 1, 1, 1, False),
        (63, 1, 16, 3, False),
        (5, 2, 4, 4, True),
        (2, 3, 100, 7, True),
    ],
)
def test_odd_sizes_equal_the_dense_oracle(S, B, E, K, shared):
    layer = make_layer(E, K, shared=shared)
    check_against_the_oracle(layer, torch.randn(S, B, D, requires_grad=True))


def test_transposed_input_equals_the_dense_oracle():
    x_BSD = torch.randn(3, 7, D)
    check_against_the_oracle(make_layer(), x_BSD.transpose(0, 1).requires_grad_())


def test_hot_and_empty_experts():
    layer = make_layer()
    layer.router.bias_E.copy_(torch.tensor([0.0, 0, -9, 9, 0, -9]))
    x_SBD = torch.randn(7, 3, D, requires_grad=True)
    check_against_the_oracle(layer, x_SBD)
    output = layer(x_SBD)
    assert output.counts_E[[2, 3, 5]].tolist() == [0, 21, 0] and output.counts_E.sum() == 42
    output.y.sum().backward()
    for grad_e in (layer.experts.w_gate_up_eGD.grad, layer.experts.w_down_eDF.grad):
        assert not grad_e[[2, 5]].any() and grad_e[[0, 1, 3, 4]].flatten(1).any(dim=1).all()


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_are_those_of_its_tokens(scope, score):
    layer = make_layer(aux_loss=scope, aux_loss_coeff=0.3, z_loss_coeff=0.01, score=score)
    x_SBD = torch.randn(7, 3, D)
    losses = layer(x_SBD).losses
    weight_ED = layer.router.weight_ED.detach().double().requires_grad_()
    logits_SBE = x_SBD.double() @ weight_ED.T
    ids_SBK = layer.router(x_SBD.flatten(0, 1)).ids_TK.view(7, 3, 2)
    balance = 0.3 * balance_loss(logits_SBE, ids_SBK, scope=scope, score=score)
    z = 0.01 * z_loss(logits_SBE)
    assert_close("balance", losses.balance, balance)
    assert_close("z", losses.z, z)
    (actual,) = torch.autograd.grad(losses.total, layer.router.weight_ED)
    (expected,) = torch.autograd.grad(balance + z, weight_ED)
    assert_close("router.weight_ED.grad", actual, expected)


def test_builds_on_meta_and_is_filled_later():
    layer = MoELayer(make_layer().config, device="meta")
    tensors = [*layer.parameters(), *layer.buffers()]
    assert len(tensors) == 6 and all(t.is_meta for t in tensors)
    source = make_layer()
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x_SBD = torch.randn(7, 3, D)
    assert torch.equal(layer(x_SBD).y, source(x_SBD).y)


def test_a_bf16_layer_keeps_its_router_in_fp32():
    layer = make_layer(dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in layer.named_parameters()}
    assert dtypes.pop("router.weight_ED") == layer.router.bias_E.dtype == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    x_TD = torch.randn(63, D, dtype=torch.bfloat16)
    expected_TE = x_TD.double() @ layer.router.weight_ED.double().T
    assert_close("logits", gate(x_TD, layer.router.weight_ED), expected_TE, dtype=torch.float32)


def test_the_gate_saves_its_input_as_it_came():
    weight_ED = torch.randn(6, D, requires_grad=True)
    x_TD = torch.randn(63, D, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        logits_TE = gate(x_TD, weight_ED)
    assert [t.data_ptr() for t in saved] == [x_TD.data_ptr(), weight_ED.data_ptr()]
    expected_TE = torch.nn.functional.linear(x_TD.float(), weight_ED)
    assert torch.equal(logits_TE, expected_TE)
    cotangent_TE = torch.randn(63, 6)
    actual, expected = (
        gradients(logits, cotangent_TE, x=x_TD, weight_ED=weight_ED) for logits in (logits_TE, expected_TE)
    )
    for name, grad in actual.items():
        assert grad.dtype == expected[name].dtype
        assert_close(f"{name}.grad", grad, expected[name])


@pytest.mark.parametrize("rounding", ["down", "nearest"])
def test_rounding_leaves_out_the_dropped_pairs_in_training_only(rounding):
    layer = make_layer(shared=False, rounding=rounding, tile_rows=4)
    x_SBD = torch.randn(7, 3, D, requires_grad=True)
    routing = layer.router(x_SBD.flatten(0, 1))
    dropped_TK = routing.ids_TK < 0
    assert dropped_TK.any() and not dropped_TK.all()
    if rounding == "down":
        assert not (routing.counts_E % 4).any()
    plain = make_layer(shared=False)
    plain.load_state_dict(layer.state_dict())
    full = plain.router(x_SBD.flatten(0, 1))
    kept = Routing(full.ids_TK, full.weights_TK.masked_fill(dropped_TK, 0), full.counts_E)
    dispatched = plain.dispatcher.dispatch(x_SBD.flatten(0, 1), kept)
    expected_TD = plain.dispatcher.combine(plain.experts(dispatched.x_RD, dispatched), dispatched)
    actual_TD = layer(x_SBD).y.flatten(0, 1)
    assert_close("y", actual_TD, expected_TD)
    cotangent_TD = torch.randn(21, D)
    inputs = [{"x": x_SBD} | dict(module.named_parameters()) for module in (layer, plain)]
    actual = gradients(actual_TD, cotangent_TD, **inputs[0])
    for name, expected in gradients(expected_TD, cotangent_TD, **inputs[1]).items():
        assert_close(f"{name}.grad", actual[name], expected)
    assert torch.equal(layer.eval()(x_SBD).y, plain(x_SBD).y)


def test_sums_for_the_losses_change_no_routing():
    router = make_layer(score="sigmoid", num_groups=3, top_groups=2).router
    x_TD = torch.randn(63, D)
    plain, summed = router(x_TD), router(x_TD, num_sequences=7)
    assert plain.sums is None and summed.sums.counts_BE.shape == (7, 6)
    for name in ("ids_TK", "weights_TK", "counts_E"):
        assert torch.equal(getattr(plain, name), getattr(summed, name)), name


@pytest.mark.parametrize(
    "router",
    [{}, ROUTERS["sigmoid_groups"] | {"num_groups": 2, "rounding": "down", "tile_rows": 4}],
    ids=["", "groups_and_rounding"],
)
def test_compiles_as_one_graph(router):
    layer = make_layer(
        dtype=torch.bfloat16, aux_loss="sequence", aux_loss_coeff=0.1, z_loss_coeff=0.1, **router
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x_SBD = torch.randn(7, 3, D, dtype=torch.bfloat16, requires_grad=True)
    results = []
    for run in (layer, compiled):
        output = run(x_SBD)
        total = output.y.float().square().sum() + output.losses.total
        results.append(gradients(total, torch.ones(()), x=x_SBD, **dict(layer.named_parameters())))
    for name, eager in results[0].items():
        assert_close(f"{name}.grad", results[1][name], eager, dtype=torch.bfloat16)


def test_imports_no_engine():
    code = "import sys, moe.layer; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"megatron", "deepspeed", "transformers", "wandb", "transformer_engine"}
