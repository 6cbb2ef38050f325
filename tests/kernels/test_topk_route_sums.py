"""The sums for router losses: each backend against the reference, alone and with the weights' gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gradients import gradients
from routing_modes import MODES, PLAIN
from tolerances import assert_close
from torch import Tensor

from moe.kernels.topk_route import topk_route, topk_route_with_sums
from moe.kernels.topk_route.reference import (
    route_sums_backward_reference,
    route_sums_reference,
    topk_route_backward_reference,
)

pytestmark = pytest.mark.usefixtures("poison_empty")

BACKENDS = ("torch", "triton")
SIGMOID = MODES["sigmoid_renormalized"]


def make_logits(T: int, E: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """They lean to the low experts, so that experts differ in their sums."""
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(T * E), dtype=torch.float64)
    return (logits_TE - torch.arange(E) / E).to(dtype)


def assert_equals_the_reference(route, logits_TE, top_k, num_sequences, mode, *, device="cpu") -> None:
    """Choice and weights as without the sums; the sums; and the logits' gradient through all that has one."""
    on_device_TE = logits_TE.to(device).requires_grad_()
    ids_TK, weights_TK, sums = route(on_device_TE, top_k, num_sequences=num_sequences, **mode)
    plain = topk_route(on_device_TE, top_k, **mode, backend=route.keywords["backend"])
    assert torch.equal(ids_TK, plain[0]) and torch.equal(weights_TK, plain[1])
    assert torch.equal(sums.counts_BE.sum(dim=0), plain[2])
    counts_BE, shares_BE, z_B = route_sums_reference(
        logits_TE, ids_TK.cpu(), num_sequences, score=mode["score"]
    )
    assert sums.counts_BE.dtype == torch.int64 and torch.equal(sums.counts_BE.cpu(), counts_BE)
    assert sums.shares_BE.dtype == sums.z_B.dtype == shares_BE.dtype
    assert_close("shares", sums.shares_BE.cpu(), shares_BE)
    assert_close("z", sums.z_B.cpu(), z_B)
    generator = torch.Generator().manual_seed(top_k)
    outputs = (weights_TK, sums.shares_BE, sums.z_B)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
    total = sum((x * cotangent.to(device)).sum() for x, cotangent in zip(outputs, cotangents, strict=True))
    actual_TE = gradients(total, torch.ones((), device=device), logits=on_device_TE)["logits"]
    expected_TE = topk_route_backward_reference(cotangents[0], logits_TE, ids_TK.cpu(), **mode)
    expected_TE += route_sums_backward_reference(*cotangents[1:], logits_TE, score=mode["score"])
    assert actual_TE.dtype == logits_TE.dtype
    # Shares sum to one: with few experts the terms of a gradient cancel.
    assert_close("logits.grad", actual_TE.cpu(), expected_TE, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (63, 16, 2, 7), (63, 100, 8, 1), (12, 3, 3, 12)], ids=str)
def test_torch_equals_the_reference(size, mode, dtype):
    T, E, K, B = size
    route = partial(topk_route_with_sums, backend="torch")
    assert_equals_the_reference(route, make_logits(T, E, dtype), K, B, mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), (60, 16, 2, 4), (34, 100, 8, 2), (4, 3, 3, 4), (2, 1000, 16, 1)], ids=str
)
def test_triton_equals_the_reference(size, mode, dtype, triton_device):
    T, E, K, B = size
    route = partial(topk_route_with_sums, backend="triton")
    assert_equals_the_reference(route, make_logits(T, E, dtype), K, B, mode, device=triton_device)


@pytest.mark.parametrize("mode", [MODES["softmax"], SIGMOID], ids=["softmax", "sigmoid"])
def test_triton_equals_the_reference_where_a_program_takes_many_blocks(mode, triton_device, monkeypatch):
    from moe.kernels.topk_route import triton_launch

    monkeypatch.setattr(triton_launch, "rounds_of_blocks", lambda *_: 3)
    route = partial(topk_route_with_sums, backend="triton")
    assert_equals_the_reference(route, make_logits(2 * 41, 20), 4, 2, mode, device=triton_device)


def test_many_rows_leave_4096_programs_and_wide_rows_no_loop():
    from moe.kernels.topk_route.triton_launch import rounds_of_blocks

    assert [rounds_of_blocks(T, 8, 128) for T in (0, 4096, 16_384, 131_072, 2**20)] == [1, 1, 1, 4, 32]
    assert rounds_of_blocks(2**20, 1, 1024) == 1


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_triton_sums_over_groups_of_padded_columns(with_bias, triton_device):
    bias_E = torch.randn(100, generator=torch.Generator().manual_seed(1)) if with_bias else None
    options = {"score": "sigmoid", "num_groups": 5, "top_groups": 3, "num_sequences": 2}
    logits_TE = make_logits(14, 100)
    ids_TK, _, sums = topk_route_with_sums(
        logits_TE.to(triton_device),
        8,
        **options,
        bias_E=None if bias_E is None else bias_E.to(triton_device),
        backend="triton",
    )
    expected = route_sums_reference(logits_TE, ids_TK.cpu(), 2, score="sigmoid")
    assert torch.equal(sums.counts_BE.cpu(), expected[0])
    assert_close("shares", sums.shares_BE.cpu(), expected[1])
    assert_close("z", sums.z_B.cpu(), expected[2])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_equations_of_the_gradient_in_float64(score):
    logits_TE = make_logits(6, 5, torch.float64).requires_grad_()
    ids_TK = topk_route(logits_TE, 2)[0]
    _, shares_BE, z_B = route_sums_reference(logits_TE, ids_TK, 2, score=score)
    grad_shares_BE, grad_z_B = torch.randn_like(shares_BE), torch.randn_like(z_B)
    total = (shares_BE * grad_shares_BE).sum() + (z_B * grad_z_B).sum()
    actual_TE = route_sums_backward_reference(grad_shares_BE, grad_z_B, logits_TE.detach(), score=score)
    assert_close("logits.grad", actual_TE, gradients(total, torch.ones(()), logits=logits_TE)["logits"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores_stay_finite(backend, triton_device):
    logits_TE = torch.tensor([[-80.0] * 4, [80.0, -80, 80, 0]], device=triton_device, requires_grad=True)
    for score in ("softmax", "sigmoid"):
        _, weights_TK, sums = topk_route_with_sums(
            logits_TE, 2, score=score, num_sequences=1, backend=backend
        )
        total = weights_TK.sum() + sums.shares_BE.square().sum() + sums.z_B.sum()
        assert gradients(total, torch.ones(()), logits=logits_TE)["logits"].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_sum_to_zero(backend, triton_device):
    logits_TE = torch.empty(0, 16, device=triton_device, requires_grad=True)
    ids_TK, _, sums = topk_route_with_sums(logits_TE, 2, num_sequences=3, backend=backend)
    (sums.shares_BE.sum() + sums.z_B.sum()).backward()
    assert ids_TK.shape == (0, 2) and logits_TE.grad.shape == (0, 16)
    assert not sums.counts_BE.any() and not sums.shares_BE.any() and not sums.z_B.any()
    assert sums.shares_BE.shape == (3, 16)


def test_triton_reruns_are_bit_equal_and_save_logits_and_ids_only(triton_device):
    logits_TE = make_logits(63, 16).to(triton_device).requires_grad_()
    saved: list[Tensor] = []
    runs = []
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            ids_TK, _, sums = topk_route_with_sums(logits_TE, 4, **PLAIN, num_sequences=7, backend="triton")
        assert [x.shape for x in saved] == [logits_TE.shape, ids_TK.shape]
        saved.clear()
        total = sums.shares_BE.square().sum() + sums.z_B.sum()
        grad_TE = gradients(total, torch.ones((), device=triton_device), logits=logits_TE)["logits"]
        runs.append((sums.counts_BE, sums.shares_BE, sums.z_B, grad_TE))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_traces_one_graph(backend, triton_device):
    def losses(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        _, weights_TK, sums = topk_route_with_sums(logits_TE, 2, num_sequences=3, backend=backend)
        return weights_TK.square().sum(), (sums.shares_BE * sums.counts_BE).sum() + sums.z_B.sum()

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for T in (6, 12):  # the second size makes the shape dynamic
        logits_TE = torch.randn(T, 16, device=triton_device, requires_grad=True)
        actual, expected = compiled(logits_TE), losses(logits_TE)
        grads = [torch.autograd.grad(sum(run), logits_TE)[0] for run in (actual, expected)]
        assert all(torch.equal(a, e) for a, e in zip((*actual, grads[0]), (*expected, grads[1]), strict=True))


@pytest.mark.parametrize("num_sequences", [0, 4, 65_536])
def test_sequences_that_do_not_fit_are_refused(num_sequences):
    with pytest.raises(ValueError, match=f"num_sequences={num_sequences} must divide the 6 tokens"):
        topk_route_with_sums(torch.zeros(6, 4), 2, num_sequences=num_sequences)
