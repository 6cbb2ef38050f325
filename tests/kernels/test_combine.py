"""permute and combine against plain indexing and the reference in float64: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from gradients import gradients
from tolerances import assert_close

from moe.kernels.combine import combine, permute
from moe.kernels.combine.reference import combine_reference
from moe.kernels.permute_index import permute_index

pytestmark = pytest.mark.usefixtures("poison_empty")

D = 5  # these two take any width
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(0, 3, 2), (1, 1, 1), (1, 16, 3), (7, 3, 3), (63, 16, 2), (63, 100, 8)]  # T, E, K


def routed(T: int, E: int, K: int) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """order and inverse of a random routing, in which no token meets an expert twice."""
    generator = torch.Generator().manual_seed(T * E + K)
    ids_TK = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :K]
    order_N, inverse_N, _ = permute_index(ids_TK.flatten(), E)
    return order_N, inverse_N, generator


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "E", "K"), SIZES)
def test_permute_equals_plain_indexing(T, E, K, dtype):
    order_N, inverse_N, generator = routed(T, E, K)
    x_TD = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    expected_x_TD = x_TD.detach().double().requires_grad_()
    cotangent_ND = torch.randn(T * K, D, generator=generator).to(dtype)
    out_ND = permute(x_TD, order_N, inverse_N, K)
    expected_ND = expected_x_TD.repeat_interleave(K, dim=0)[order_N]
    assert out_ND.dtype == dtype and torch.equal(out_ND.double(), expected_ND)
    actual = gradients(out_ND, cotangent_ND, x=x_TD)
    expected = gradients(expected_ND, cotangent_ND, x=expected_x_TD)
    assert_close("x.grad", actual["x"], expected["x"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "E", "K"), SIZES)
def test_combine_equals_the_reference(T, E, K, dtype):
    order_N, inverse_N, generator = routed(T, E, K)
    y_ND = torch.randn(T * K, D, generator=generator).to(dtype).requires_grad_()
    weights_TK = torch.rand(T, K, generator=generator).requires_grad_()
    expected_y_ND, expected_weights_TK = (t.detach().double().requires_grad_() for t in (y_ND, weights_TK))
    cotangent_TD = torch.randn(T, D, generator=generator).to(dtype)
    out_TD = combine(y_ND, weights_TK, order_N, inverse_N)
    expected_TD = combine_reference(expected_y_ND, expected_weights_TK, inverse_N)
    assert out_TD.dtype == dtype
    assert_close("y", out_TD, expected_TD)
    if T:  # the reference of nothing has no graph
        actual = gradients(out_TD, cotangent_TD, y=y_ND, weights=weights_TK)
        expected = gradients(expected_TD, cotangent_TD, y=expected_y_ND, weights=expected_weights_TK)
        assert_close("y.grad", actual["y"], expected["y"])
        # The cotangent and y are exact in both, and the products are summed in fp32.
        assert_close("weights.grad", actual["weights"], expected["weights"])


def test_no_tokens_have_gradients_too():
    order_N, inverse_N, _ = routed(0, 3, 2)
    x_TD = torch.empty(0, D, requires_grad=True)
    weights_TK = torch.empty(0, 2, requires_grad=True)
    combine(permute(x_TD, order_N, inverse_N, 2), weights_TK, order_N, inverse_N).sum().backward()
    assert x_TD.grad.shape == (0, D) and weights_TK.grad.shape == (0, 2)


def test_float64_gradcheck():
    T, E, K = 5, 4, 3
    order_N, inverse_N, generator = routed(T, E, K)
    x_TD, y_ND, weights_TK = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((T, D), (T * K, D), (T, K))
    )
    torch.autograd.gradcheck(lambda x: permute(x, order_N, inverse_N, K), x_TD)
    torch.autograd.gradcheck(lambda y, w: combine(y, w, order_N, inverse_N), (y_ND, weights_TK))


def test_bf16_rows_are_summed_in_fp32():
    # In bf16 the sum would stall at 1/2 + 255/256 * 0: 1/512 is lost beside 1/2.
    K = 512
    order_N, inverse_N, _ = routed(1, K, K)
    y_TD = combine(torch.ones(K, D, dtype=torch.bfloat16), torch.full((1, K), 1 / K), order_N, inverse_N)
    assert y_TD.dtype == torch.bfloat16 and y_TD.eq(1).all()


def test_what_does_not_fit_is_refused():
    order_N, inverse_N, _ = routed(4, 3, 2)
    x_TD, weights_TK = torch.zeros(4, D), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"must hold 12 rows, got \(8,\) and \(8,\)"):
        permute(x_TD, order_N, inverse_N, 3)
    with pytest.raises(ValueError, match=r"must hold 8 rows, got \(8,\) and \(7,\)"):
        permute(x_TD, order_N, inverse_N[:7], 2)
    with pytest.raises(ValueError, match=r"must hold 8 rows, got \(7,\) and \(8,\)"):
        combine(torch.zeros(8, D), weights_TK, order_N[:7], inverse_N)
    with pytest.raises(ValueError, match="must hold 9 rows"):
        combine(torch.zeros(9, D), weights_TK, order_N, inverse_N)
    with pytest.raises(
        ValueError, match=r"weights must be fp32, as topk_route gives them, got torch.bfloat16"
    ):
        combine(torch.zeros(8, D), weights_TK.bfloat16(), order_N, inverse_N)
