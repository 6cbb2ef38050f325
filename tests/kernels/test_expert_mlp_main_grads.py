"""Gradients of the experts' weights that the backward adds to fp32 tensors: the bits of adding them after."""

from __future__ import annotations

import pytest
import torch
from gradients import gradients
from routed_pairs import ROUTINGS
from torch import Tensor

from moe.kernels.expert_mlp import expert_mlp
from moe.kernels.permute_index import permute_index

pytestmark = pytest.mark.usefixtures("poison_empty")

WEIGHTS = ("w_gate_up", "w_down")
BACKENDS = ("torch", "triton")
Index = tuple[Tensor, Tensor, Tensor]


def example(
    dtype: torch.dtype, device: str, routing: str = "sentinels"
) -> tuple[dict[str, Tensor], Index, Tensor]:
    """Leaves by name, the index of the pairs, and a gradient of the output."""
    E, ids_TK = ROUTINGS[routing]
    (T, K), D, F = ids_TK.shape, 24, 20
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (T, D), "w_gate_up": (E, 2 * F, D), "w_down": (E, D, F)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["weights"] = torch.rand(T, K, generator=generator)
    leaves = {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}
    index = permute_index(ids_TK.flatten().to(device), E)
    return leaves, index, torch.randn(T, D, generator=generator).to(device, dtype)


def empty_main_grads(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """As if a micro-batch had been there before."""
    gate_up, down = (torch.full_like(leaves[name], 0.5, dtype=torch.float32) for name in WEIGHTS)
    return gate_up.detach(), down.detach()


@pytest.mark.parametrize("routing", ["sentinels", "hot_expert", "no_tokens"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_gradients_are_added_with_the_bits_of_adding_them_after(backend, routing, triton_device):
    leaves, index, grad_TD = example(torch.float32, triton_device, routing)
    main_grads, expected = empty_main_grads(leaves), empty_main_grads(leaves)
    for _ in range(2):  # micro-batches
        y_TD = expert_mlp(*leaves.values(), index, backend=backend)
        unfused = gradients(y_TD, grad_TD, **leaves)
        for main, name in zip(expected, WEIGHTS, strict=True):
            main.add_(unfused[name])
        fused_TD = expert_mlp(*leaves.values(), index, backend=backend, main_grads=main_grads)
        fused = gradients(fused_TD, grad_TD, **leaves)
        assert torch.equal(fused_TD, y_TD)
        for name in ("x", "weights"):
            assert torch.equal(fused[name], unfused[name]), name
    for name, main, wanted in zip(WEIGHTS, main_grads, expected, strict=True):
        assert torch.equal(main, wanted), name


def test_triton_rounds_no_bf16_gradient_on_the_way(triton_device):
    leaves, index, grad_TD = example(torch.bfloat16, triton_device)
    main_grads = empty_main_grads(leaves)
    gradients(expert_mlp(*leaves.values(), index, backend="triton", main_grads=main_grads), grad_TD, **leaves)
    plain = gradients(expert_mlp(*leaves.values(), index, backend="triton"), grad_TD, **leaves)
    for name, main in zip(WEIGHTS, main_grads, strict=True):
        added = main - 0.5
        torch.testing.assert_close(added, plain[name].float(), rtol=4e-3, atol=1e-5)
        assert not torch.equal(added, added.bfloat16().float()), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_forwards_may_wait_for_their_backwards(backend, triton_device):
    leaves, index, grad_TD = example(torch.float32, triton_device)
    main_grads, expected = empty_main_grads(leaves), empty_main_grads(leaves)
    waiting = [expert_mlp(*leaves.values(), index, backend=backend, main_grads=main_grads) for _ in range(2)]
    for y_TD in waiting:  # as in a pipeline
        y_TD.backward(grad_TD)
    unfused = gradients(expert_mlp(*leaves.values(), index, backend=backend), grad_TD, **leaves)
    for name, main, wanted in zip(WEIGHTS, main_grads, expected, strict=True):
        assert torch.equal(main, wanted + unfused[name] + unfused[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_biases_stay_with_autograd(backend, triton_device):
    leaves, index, grad_TD = example(torch.float32, triton_device)
    _, w_gate_up, w_down, _ = leaves.values()
    biases = tuple(torch.randn(w.shape[:2], device=w.device, requires_grad=True) for w in (w_gate_up, w_down))
    named = leaves | dict(zip(("b_gate_up", "b_down"), biases, strict=True))
    main_grads = empty_main_grads(leaves)
    fused, unfused = (
        gradients(
            expert_mlp(*leaves.values(), index, biases=biases, backend=backend, main_grads=mains),
            grad_TD,
            **named,
        )
        for mains in (main_grads, None)
    )
    for name in ("x", "weights", "b_gate_up", "b_down"):
        assert torch.equal(fused[name], unfused[name]), name
    for name, main in zip(WEIGHTS, main_grads, strict=True):
        assert torch.equal(main, unfused[name] + 0.5), name


def test_custom_op_keeps_torchs_rules():
    leaves, index, grad_TD = example(torch.float32, "cpu")
    h_NG = torch.ones(index[0].numel(), leaves["w_gate_up"].shape[1])
    tensors = (grad_TD, *(leaf.detach() for leaf in leaves.values()), *index, None, None, h_NG)
    torch.library.opcheck(
        torch.ops.joulemoe.expert_mlp_backward_into.default,
        (*tensors, "swiglu", "torch", *empty_main_grads(leaves)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_torch_compile_refuses_and_without_fullgraph_leaves_them_to_eager():
    leaves, index, grad_TD = example(torch.float32, "cpu")
    main_grads, expected = empty_main_grads(leaves), empty_main_grads(leaves)
    whole, parts = (torch.compile(expert_mlp, fullgraph=full, backend="aot_eager") for full in (True, False))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="main_grads do not go with"):
        whole(*leaves.values(), index, main_grads=main_grads)
    torch.compiler.reset()
    for op, mains in ((parts, main_grads), (expert_mlp, expected)):
        for y_TD in [op(*leaves.values(), index, main_grads=mains) for _ in range(2)]:
            y_TD.backward(grad_TD)
    for main, wanted in zip(main_grads, expected, strict=True):
        assert torch.equal(main, wanted)


def test_a_backward_for_other_inputs_adds_as_well():
    leaves, index, grad_TD = example(torch.float32, "cpu")
    main_grads = empty_main_grads(leaves)
    y_TD = expert_mlp(*leaves.values(), index, main_grads=main_grads)
    torch.autograd.grad(y_TD, leaves["x"], grad_TD)
    assert all(bool((main != 0.5).any()) for main in main_grads)


def test_anomaly_detection_finds_nothing_in_memory_without_meaning():
    leaves, index, grad_TD = example(torch.float32, "cpu")  # torch.empty is NaN here
    with torch.autograd.set_detect_anomaly(True):
        expert_mlp(*leaves.values(), index, main_grads=empty_main_grads(leaves)).backward(grad_TD)


@pytest.mark.parametrize("name", WEIGHTS)
def test_frozen_weights_are_refused_where_a_backward_could_come(name):
    leaves, index, _ = example(torch.float32, "cpu")
    leaves[name].requires_grad_(False)
    with pytest.raises(ValueError, match=f"weights that require gradients, {name[2:]} does not"):
        expert_mlp(*leaves.values(), index, main_grads=empty_main_grads(leaves))
    with torch.no_grad():
        expert_mlp(*leaves.values(), index, main_grads=empty_main_grads(leaves))


def test_what_does_not_fit_is_refused():
    leaves, index, _ = example(torch.bfloat16, "cpu")
    gate_up, down = empty_main_grads(leaves)
    with pytest.raises(
        ValueError, match=r"main_grads of down must be contiguous torch.float32 of shape .*bf"
    ):
        expert_mlp(*leaves.values(), index, main_grads=(gate_up, down.bfloat16()))
    with pytest.raises(ValueError, match=r"main_grads of gate_up must be .* got torch.float32 of \(1,"):
        expert_mlp(*leaves.values(), index, main_grads=(gate_up[:1], down))
    with pytest.raises(ValueError, match="main_grads go with precision='wide', got 'fp8'"):
        expert_mlp(*leaves.values(), index, main_grads=(gate_up, down), precision="fp8")
