"""Triton's permute and combine: the interpreter (or a GPU) against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gradients import gradients
from tolerances import assert_close
from torch import Tensor

from moe.kernels.combine import combine, permute
from moe.kernels.combine.reference import combine_reference, permute_reference
from moe.kernels.permute_index import permute_index

pytestmark = pytest.mark.usefixtures("poison_empty")

E = 16
permute_triton = partial(permute, backend="triton")
combine_triton = partial(combine, backend="triton")

# T, K, D. The last do not fit into one tile.
SIZES = [(T, K, D) for T in (0, 1, 7, 63) for K in (1, 2, 8) for D in (1, 33, 100, 256)]
SIZES += [(3, 2, 1025), (2, 3, 2048)]
CASES = [(*size, dtype) for size in SIZES for dtype in (torch.float32, torch.bfloat16)]
CASES += [(7, 2, 33, torch.float16)]


def routed(T: int, K: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """order and inverse of a random routing, in which no token meets an expert twice."""
    generator = torch.Generator().manual_seed(T * E + K)
    ids_TK = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :K]
    order_N, inverse_N, _ = permute_index(ids_TK.flatten(), E)
    return order_N, inverse_N, generator


@pytest.mark.parametrize(("T", "K", "D", "dtype"), CASES, ids=str)
def test_permute_equals_the_reference(T, K, D, dtype, triton_device):
    order_N, inverse_N, generator = routed(T, K)
    x_TD = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    expected_x_TD = x_TD.detach().double().requires_grad_()
    cotangent_ND = torch.randn(T * K, D, generator=generator).to(dtype)
    out_ND = permute_triton(x_TD.to(triton_device), order_N.to(triton_device), inverse_N.to(triton_device), K)
    expected_ND = permute_reference(expected_x_TD, order_N, K)
    assert out_ND.dtype == dtype and torch.equal(out_ND.cpu().double(), expected_ND)
    actual = gradients(out_ND, cotangent_ND.to(triton_device), x=x_TD)
    assert actual["x"].dtype == dtype
    if T:  # the reference of nothing has no graph
        expected = gradients(expected_ND, cotangent_ND, x=expected_x_TD)
        assert_close("x.grad", actual["x"], expected["x"])


@pytest.mark.parametrize(("T", "K", "D", "dtype"), CASES, ids=str)
def test_combine_equals_the_reference(T, K, D, dtype, triton_device):
    order_N, inverse_N, generator = routed(T, K)
    y_ND = torch.randn(T * K, D, generator=generator).to(dtype).requires_grad_()
    weights_TK = torch.rand(T, K, generator=generator).requires_grad_()
    expected_y_ND, expected_weights_TK = (t.detach().double().requires_grad_() for t in (y_ND, weights_TK))
    cotangent_TD = torch.randn(T, D, generator=generator).to(dtype)
    on_device = (t.to(triton_device) for t in (y_ND, weights_TK, order_N, inverse_N))
    out_TD = combine_triton(*on_device)
    expected_TD = combine_reference(expected_y_ND, expected_weights_TK, inverse_N)
    assert out_TD.dtype == dtype
    assert_close("y", out_TD.cpu(), expected_TD)
    actual = gradients(out_TD, cotangent_TD.to(triton_device), y=y_ND, weights=weights_TK)
    assert actual["y"].dtype == dtype and actual["weights"].dtype == torch.float32
    if T:
        expected = gradients(expected_TD, cotangent_TD, y=expected_y_ND, weights=expected_weights_TK)
        assert_close("y.grad", actual["y"], expected["y"])
        # Terms of a dot product may cancel to nothing. Their products are exact, and summed in fp32.
        assert_close("weights.grad", actual["weights"], expected["weights"], scale=D**0.5)


def round_trip(
    x_TD: Tensor, weights_TK: Tensor, order_N: Tensor, inverse_N: Tensor, *, backend: str = "triton"
) -> Tensor:
    y_ND = permute(x_TD, order_N, inverse_N, weights_TK.shape[1], backend=backend)
    return combine(y_ND, weights_TK, order_N, inverse_N, backend=backend)


def example(device: str, T: int = 7, K: int = 2, D: int = 33) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of round_trip; rows and weights want a gradient."""
    order_N, inverse_N, generator = routed(T, K)
    x_TD = torch.randn(T, D, generator=generator).to(device).requires_grad_()
    weights_TK = torch.rand(T, K, generator=generator).to(device).requires_grad_()
    return x_TD, weights_TK, order_N.to(device), inverse_N.to(device)


def assert_same_bits(
    actual: Tensor, expected: Tensor, *, actual_inputs: dict[str, Tensor], expected_inputs: dict[str, Tensor]
) -> None:
    """Outputs, and all gradients."""
    cotangent = torch.linspace(-1, 1, actual.numel(), device=actual.device).view_as(actual)
    actual_grads = gradients(actual, cotangent, **actual_inputs)
    expected_grads = gradients(expected, cotangent, **expected_inputs)
    assert torch.equal(actual, expected)
    for name, grad in actual_grads.items():
        assert torch.equal(grad, expected_grads[name]), f"{name}.grad"


def test_reruns_are_bit_equal(triton_device):
    x_TD, weights_TK, *indices = example(triton_device, T=63, K=8, D=100)
    inputs = {"x": x_TD, "weights": weights_TK}
    first, second = (round_trip(x_TD, weights_TK, *indices) for _ in range(2))
    assert_same_bits(first, second, actual_inputs=inputs, expected_inputs=inputs)


def test_every_tensor_may_be_strided(triton_device):
    dense = example(triton_device)
    x_TD, weights_TK, *indices = (torch.stack((t.detach(), t.detach()), dim=-1)[..., 0] for t in dense)
    assert not any(t.is_contiguous() for t in (x_TD, weights_TK, *indices))
    actual = round_trip(x_TD.requires_grad_(), weights_TK.requires_grad_(), *indices)
    assert_same_bits(
        actual,
        round_trip(*dense),
        actual_inputs={"x": x_TD, "weights": weights_TK},
        expected_inputs={"x": dense[0], "weights": dense[1]},
    )


def test_the_gradient_of_a_sum_has_strides_of_zero(triton_device):
    x_TD, weights_TK, order_N, inverse_N = example(triton_device)
    permute_triton(x_TD, order_N, inverse_N, 2).sum().backward()
    assert (x_TD.grad == 2).all()
    y_ND = torch.ones(14, 33, device=triton_device)
    combine_triton(y_ND, weights_TK, order_N, inverse_N).sum().backward()
    assert (weights_TK.grad == 33).all()


def test_bf16_rows_are_summed_in_fp32(triton_device):
    # In bf16 both sums would stall at 256: 257 lies between two numbers.
    K, D = 512, 5
    order_N = torch.arange(K, device=triton_device)
    x_TD = torch.zeros(1, D, dtype=torch.bfloat16, device=triton_device, requires_grad=True)
    y_ND = permute_triton(x_TD, order_N, order_N, K)
    y_ND.backward(torch.ones_like(y_ND))
    y_TD = combine_triton(torch.ones_like(y_ND), torch.ones(1, K, device=triton_device), order_N, order_N)
    assert x_TD.grad.eq(K).all() and y_TD.eq(K).all()


def test_saves_no_row_twice(triton_device):
    saved = []
    x_TD, weights_TK, order_N, inverse_N = example(triton_device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y_ND = permute_triton(x_TD, order_N, inverse_N, 2)
        assert [t.data_ptr() for t in saved] == [inverse_N.data_ptr()]
        saved.clear()
        combine_triton(y_ND, weights_TK, order_N, inverse_N)
    inputs = (y_ND, weights_TK, inverse_N)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in inputs]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile_traces_one_graph(backend, triton_device):
    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    for T in (7, 12):  # the second size makes the shape dynamic
        arguments = example(triton_device, T=T)
        inputs = {"x": arguments[0], "weights": arguments[1]}
        results = [run(*arguments, backend=backend) for run in (compiled, round_trip)]
        assert_same_bits(*results, actual_inputs=inputs, expected_inputs=inputs)


def test_custom_ops_keep_torchs_rules(triton_device):
    x_TD, weights_TK, _, inverse_N = example(triton_device)
    y_ND = torch.randn(14, 33, device=triton_device, requires_grad=True)
    ops = torch.ops.joulemoe
    torch.library.opcheck(ops.permute.default, (x_TD, inverse_N, 2))
    torch.library.opcheck(ops.combine.default, (y_ND, weights_TK, inverse_N))
    torch.library.opcheck(ops.unpermute.default, (y_ND, inverse_N, 2))
    backward = (x_TD.detach(), y_ND.detach(), weights_TK.detach(), inverse_N)
    torch.library.opcheck(ops.combine_backward.default, backward)


def test_what_the_kernels_cannot_do_is_refused(triton_device):
    x_TD, weights_TK, order_N, inverse_N = example(triton_device)
    y_ND = torch.zeros(14, 33, device=triton_device)
    with pytest.raises(ValueError, match=r"takes x of float32, bfloat16, float16, got torch.float64"):
        permute_triton(x_TD.double(), order_N, inverse_N, 2)
    with pytest.raises(ValueError, match=r"takes y of float32, bfloat16, float16, got torch.float64"):
        combine_triton(y_ND.double(), weights_TK, order_N, inverse_N)
    with pytest.raises(ValueError, match=r"takes weights of float32, got torch.float64; use backend='torch'"):
        combine_triton(y_ND, weights_TK.double(), order_N, inverse_N)
    with pytest.raises(ValueError, match="must hold 28 rows"):
        permute_triton(x_TD, order_N, inverse_N, 4)
