"""topk_route against its reference, and the promises that a reference alone does not show."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gradients import gradients
from routing_modes import MODES, weights_are_constant
from tolerances import assert_close

from moe.kernels.topk_route import topk_route
from moe.kernels.topk_route.reference import topk_route_backward_reference, topk_route_reference

pytestmark = pytest.mark.usefixtures("poison_empty")

SIZES = [(1, 1, 1), (1, 16, 2), (7, 3, 3), (7, 16, 16), (63, 3, 1), (63, 16, 2), (63, 100, 8), (7, 100, 100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_reference(size, mode, with_bias, dtype):
    T, E, K = size
    generator = torch.Generator().manual_seed(T * E + K)
    logits_TE = torch.randn(T, E, generator=generator).to(dtype).requires_grad_()
    bias_E = torch.randn(E, generator=generator) if with_bias else None
    cotangent_TK = torch.randn(T, K, generator=generator)
    results = [route(logits_TE, K, **mode, bias_E=bias_E) for route in (topk_route, topk_route_reference)]
    (ids_TK, weights_TK, counts_E), (expected_ids_TK, expected_weights_TK, expected_counts_E) = results
    assert ids_TK.dtype == torch.int64 and torch.equal(ids_TK, expected_ids_TK)
    assert counts_E.dtype == torch.int64 and torch.equal(counts_E, expected_counts_E)
    assert weights_TK.dtype == torch.float32
    assert_close("weights", weights_TK, expected_weights_TK)
    actual, expected = (gradients(w, cotangent_TK, logits=logits_TE) for _, w, _ in results)
    if weights_are_constant(E, K, mode):
        assert_close("logits.grad", actual["logits"], torch.zeros(T, E), scale=1.0)
    else:
        assert_close("logits.grad", actual["logits"], expected["logits"])


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_ties_go_to_the_lower_id(mode):
    route = partial(topk_route, **mode)
    ids_TK, _, counts_E = route(torch.zeros(63, 100), 8)
    assert ids_TK.tolist() == [list(range(8))] * 63
    assert counts_E.tolist() == [63] * 8 + [0] * 92
    assert route(torch.tensor([[1.0, 3, 3, 0, 3, 1]]), 5)[0].tolist() == [[1, 2, 4, 0, 5]]


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("size", [(16, 4, 4, 2), (100, 16, 5, 3), (256, 8, 8, 4), (12, 6, 6, 3)], ids=str)
def test_groups_equal_the_reference(size, mode, with_bias):
    E, K, num_groups, top_groups = size
    generator = torch.Generator().manual_seed(E)
    logits_TE = torch.randn(31, E, generator=generator)
    bias_E = torch.randn(E, generator=generator) if with_bias else None
    options = mode | {"bias_E": bias_E, "num_groups": num_groups, "top_groups": top_groups}
    ids_TK, weights_TK, counts_E = topk_route(logits_TE, K, **options)
    expected_ids_TK, expected_weights_TK, expected_counts_E = topk_route_reference(logits_TE, K, **options)
    assert torch.equal(ids_TK, expected_ids_TK) and torch.equal(counts_E, expected_counts_E)
    assert_close("weights", weights_TK, expected_weights_TK)
    groups_used = [len(set(row)) for row in (ids_TK // (E // num_groups)).tolist()]
    assert max(groups_used) <= top_groups
    assert not torch.equal(ids_TK, topk_route(logits_TE, K, **options | {"top_groups": num_groups})[0])


def test_a_group_counts_for_its_two_best():
    route = partial(topk_route, num_groups=2, top_groups=1, score_before_topk=False)
    # 5 + 1 loses to 4 + 3; equal sums go to the lower group.
    assert route(torch.tensor([[5.0, 1, 1, 4, 3, 0]]), 2)[0].tolist() == [[3, 4]]
    assert route(torch.tensor([[1.0, 5, 1, 3, 3, 3]]), 2)[0].tolist() == [[1, 0]]
    bias_E = torch.tensor([0.0, 2, 0, 0, 0, 0])
    assert route(torch.tensor([[5.0, 1, 1, 4, 3, 0]]), 2, bias_E=bias_E)[0].tolist() == [[0, 1]]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_gradient_is_that_of_the_equations_in_float64(mode):
    generator = torch.Generator().manual_seed(3)
    logits_TE = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    cotangent_TK = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    ids_TK, weights_TK, _ = topk_route(logits_TE, 3, **mode)
    assert weights_TK.dtype == torch.float64
    actual = gradients(weights_TK, cotangent_TK, logits=logits_TE)["logits"]
    expected = topk_route_backward_reference(cotangent_TK, logits_TE.detach(), ids_TK, **mode)
    assert_close("logits.grad", actual, expected)
    assert torch.autograd.gradcheck(lambda logits: topk_route(logits, 3, **mode)[1], logits_TE)


def test_renormalized_softmax_is_the_share_of_the_chosen_even_where_the_scores_vanish():
    logits_TE = torch.tensor([[80.0, -79.0, -80.0]])
    bias_E = torch.tensor([0.0, 10.0, 10.0])
    ids_TK, weights_TK, _ = topk_route(logits_TE, 2, renormalize=True, bias_E=bias_E)
    assert ids_TK.tolist() == [[1, 2]]
    assert_close("weights", weights_TK, torch.tensor([[1.0, 0.0]]).softmax(dim=1))


def test_without_a_bias_rounding_of_the_scores_makes_no_ties():
    for score in ("softmax", "sigmoid"):
        assert topk_route(torch.tensor([[-200.0, 90, 91, -199]]), 3, score=score)[0].tolist() == [[2, 1, 3]]


def test_bias_steers_the_choice_only():
    logits_TE = torch.randn(63, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    bias_E = torch.zeros(16).index_fill_(0, torch.tensor(9), 10.0).requires_grad_()
    ids_TK, weights_TK, counts_E = topk_route(logits_TE, 2, bias_E=bias_E)
    assert (ids_TK[:, 0] == 9).all() and counts_E[9] == 63
    assert not torch.equal(ids_TK, topk_route(logits_TE, 2)[0])
    assert torch.equal(weights_TK, logits_TE.softmax(dim=-1).gather(1, ids_TK))
    weights_TK.sum().backward()
    assert bias_E.grad is None and logits_TE.grad is not None


def test_renormalized_weights_sum_to_the_scale():
    logits_TE = torch.randn(63, 16, generator=torch.Generator().manual_seed(2))
    for score in ("softmax", "sigmoid"):
        _, weights_TK, _ = topk_route(logits_TE, 4, score=score, renormalize=True, scale=2.5)
        assert_close("sums", weights_TK.sum(dim=1), torch.full((63,), 2.5))


def test_vanishing_sigmoid_scores_stay_finite():
    logits_TE = torch.full((7, 4), -200.0, requires_grad=True)
    _, weights_TK, _ = topk_route(logits_TE, 2, score="sigmoid", renormalize=True)
    weights_TK.sum().backward()
    assert weights_TK.eq(0).all() and logits_TE.grad.isfinite().all()


def test_no_tokens():
    logits_TE = torch.empty(0, 16, requires_grad=True)
    ids_TK, weights_TK, counts_E = topk_route(logits_TE, 2)
    weights_TK.sum().backward()
    assert ids_TK.shape == weights_TK.shape == (0, 2) and logits_TE.grad.shape == (0, 16)
    assert counts_E.tolist() == [0] * 16


@pytest.mark.parametrize(
    ("shape", "top_k", "options", "message"),
    [
        ((2, 3, 4), 1, {}, r"logits must be \[T, E\], got shape \(2, 3, 4\)"),
        ((2, 4), 0, {}, "top_k=0 must be between 1 and the number of experts, 4"),
        ((2, 4), 5, {}, "top_k=5 must be between 1 and the number of experts, 4"),
        ((2, 4), 1, {"score": "relu"}, "score='relu' is unknown; allowed: softmax, sigmoid"),
        ((2, 4), 1, {"score": "sigmoid", "score_before_topk": False}, "it needs score_before_topk=True"),
        ((2, 4), 1, {"bias_E": torch.zeros(3)}, r"bias must be \[4\], got shape \(3,\)"),
        ((2, 4), 1, {"num_groups": 3}, "num_groups=3 must divide the 4 experts into groups of two or more"),
        ((2, 4), 1, {"num_groups": 4}, "num_groups=4 must divide the 4 experts into groups of two or more"),
        ((2, 4), 1, {"num_groups": 2, "top_groups": 3}, "top_groups=3 must be between 1 and num_groups, 2"),
        ((2, 4), 1, {"num_groups": 0}, "top_groups=1 must be between 1 and num_groups, 0"),
        ((2, 4), 3, {"num_groups": 2}, "top_k=3 is more than the 2 experts of top_groups=1"),
        ((2, 4), 1, {"backend": "cuda"}, "backend='cuda' is unknown; allowed: auto, triton, torch"),
    ],
)
def test_what_cannot_work_is_refused(shape, top_k, options, message):
    with pytest.raises(ValueError, match=message):
        topk_route(torch.zeros(shape), top_k, **options)
