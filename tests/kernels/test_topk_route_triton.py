"""topk_route's Triton backend: the interpreter (or a GPU) against the reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from gradients import gradients
from routing_modes import MODES, weights_are_constant
from tolerances import assert_close
from torch import Tensor

from moe.kernels.topk_route import topk_route
from moe.kernels.topk_route.reference import topk_route_reference

pytestmark = pytest.mark.usefixtures("poison_empty")

route = partial(topk_route, backend="triton")

# T, E, K. The interpreter takes about a millisecond for a row of 256 experts and each round.
SIZES = [
    (0, 16, 2),
    (1, 1, 1),
    (1, 256, 16),
    (7, 3, 1),
    (7, 3, 2),
    (7, 100, 8),
    (7, 256, 8),
    (63, 3, 2),
    (63, 16, 1),
    (63, 16, 2),
    (63, 16, 16),
]


def assert_equals_the_reference(
    device: str, logits_TE: Tensor, top_k: int, mode: dict[str, Any], **options: Any
) -> None:
    """Ids, weights, counts and the logits' gradient; the reference runs on the CPU."""
    T, E = logits_TE.shape
    logits_TE = logits_TE.clone().requires_grad_()
    on_device = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    results = [
        route(logits_TE.to(device), top_k, **mode, **on_device),
        topk_route_reference(logits_TE, top_k, **mode, **options),
    ]
    (ids_TK, weights_TK, counts_E), (expected_ids_TK, expected_weights_TK, expected_counts_E) = results
    assert ids_TK.dtype == torch.int64 and torch.equal(ids_TK.cpu(), expected_ids_TK)
    assert counts_E.dtype == torch.int64 and torch.equal(counts_E.cpu(), expected_counts_E)
    assert weights_TK.dtype == torch.float32
    assert_close("weights", weights_TK.cpu(), expected_weights_TK)
    cotangent_TK = torch.randn(T, top_k, generator=torch.Generator().manual_seed(T))
    actual, expected = (
        gradients(weights_TK, cotangent_TK.to(weights_TK.device), logits=logits_TE)["logits"]
        for _, weights_TK, _ in results
    )
    assert actual.dtype == logits_TE.dtype
    if weights_are_constant(E, top_k, mode):
        assert_close("logits.grad", actual, torch.zeros(T, E), scale=1.0)
    else:
        assert_close("logits.grad", actual, expected)
    if mode["score"] == "sigmoid" or mode["renormalize"] or not mode["score_before_topk"]:
        assert (actual.scatter(1, expected_ids_TK, 0) == 0).all(), "an expert not chosen has a gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_reference(size, mode, with_bias, dtype, triton_device):
    T, E, K = size
    generator = torch.Generator().manual_seed(T * E + K)
    logits_TE = torch.randn(T, E, generator=generator).to(dtype)
    bias_E = torch.randn(E, generator=generator) if with_bias else None
    assert_equals_the_reference(triton_device, logits_TE, K, mode, bias_E=bias_E)


def test_equals_the_reference_where_blocks_are_many(triton_device):
    logits_TE = torch.randn(63, 256, generator=torch.Generator().manual_seed(4))
    assert_equals_the_reference(triton_device, logits_TE, 8, MODES["sigmoid_renormalized"])


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(
    "size", [(31, 16, 4, 4, 2), (7, 100, 16, 5, 3), (5, 256, 8, 8, 4), (9, 12, 6, 6, 3)], ids=str
)
def test_groups_equal_the_reference(size, mode, with_bias, triton_device):
    T, E, K, num_groups, top_groups = size
    generator = torch.Generator().manual_seed(E)
    logits_TE = torch.randn(T, E, generator=generator)
    bias_E = torch.randn(E, generator=generator) if with_bias else None
    options = {"bias_E": bias_E, "num_groups": num_groups, "top_groups": top_groups}
    assert_equals_the_reference(triton_device, logits_TE, K, mode, **options)


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_ties_go_to_the_lower_id(mode, num_groups, with_bias, triton_device):
    generator = torch.Generator().manual_seed(5)
    values = torch.tensor([-1.0, -0.0, 0.0, 1.0])
    few_values_TE = values[torch.randint(4, (20, 16), generator=generator)]
    bias_E = torch.zeros(16) if with_bias else None
    options = {"bias_E": bias_E, "num_groups": num_groups, "top_groups": (num_groups + 1) // 2}
    assert_equals_the_reference(triton_device, few_values_TE, 6, mode, **options)
    ids_TK = route(torch.zeros(7, 16, device=triton_device), 4, **mode, num_groups=num_groups)[0]
    assert ids_TK.tolist() == [[0, 1, 2, 3]] * 7


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_bias_steers_the_choice_only(mode, triton_device):
    logits_TE = torch.randn(7, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    bias_E = torch.zeros(16).index_fill_(0, torch.tensor(9), 10.0)
    assert_equals_the_reference(triton_device, logits_TE.detach(), 2, mode, bias_E=bias_E)
    bias_E.requires_grad_()
    ids_TK, weights_TK, counts_E = route(
        logits_TE.to(triton_device), 2, **mode, bias_E=bias_E.to(triton_device)
    )
    weights_TK.sum().backward()
    assert (ids_TK[:, 0] == 9).all() and counts_E[9] == 7
    assert bias_E.grad is None and logits_TE.grad is not None


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_extreme_logits(mode, with_bias, triton_device):
    generator = torch.Generator().manual_seed(6)
    values = torch.tensor([-80.0, -40.0, 0.0, 79.0, 80.0])
    logits_TE = values[torch.randint(5, (20, 16), generator=generator)]
    logits_TE[0] = 80.0
    logits_TE[1] = -80.0
    bias_E = torch.randn(16, generator=generator) if with_bias else None
    assert_equals_the_reference(triton_device, logits_TE, 4, mode, bias_E=bias_E)


def test_hot_expert_is_counted_across_blocks(triton_device):
    logits_TE = torch.randn(150, 16, generator=torch.Generator().manual_seed(7))
    logits_TE[:, 11] = 50.0
    ids_TK, _, counts_E = route(logits_TE.to(triton_device), 2)
    assert counts_E[11] == 150
    assert torch.equal(counts_E, torch.bincount(ids_TK.flatten(), minlength=16))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_nan_is_ranked_first_as_in_the_torch_backend(triton_device):
    logits_TE = torch.randn(3, 16, generator=torch.Generator().manual_seed(8))
    logits_TE[0, 5], logits_TE[1, 7:9], logits_TE[2] = torch.nan, -torch.nan, torch.nan
    for options in ({}, {"score": "sigmoid", "bias_E": torch.zeros(16)}):
        on_device = {name: x.to(triton_device) if isinstance(x, Tensor) else x for name, x in options.items()}
        ids_TK, weights_TK, _ = route(logits_TE.to(triton_device), 3, **on_device)
        assert torch.equal(ids_TK.cpu(), topk_route(logits_TE, 3, **options, backend="torch")[0])
        assert weights_TK.isnan().any(dim=1).all()


def test_reruns_are_bit_equal(triton_device):
    logits_TE = torch.randn(63, 16, generator=torch.Generator().manual_seed(9)).to(triton_device)
    logits_TE.requires_grad_()
    runs = []
    for _ in range(2):
        ids_TK, weights_TK, counts_E = route(logits_TE, 4)
        cotangent_TK = torch.linspace(-1, 1, 252, device=triton_device).view(63, 4)
        grad_TE = gradients(weights_TK, cotangent_TK, logits=logits_TE)["logits"]
        runs.append((ids_TK, weights_TK, counts_E, grad_TE))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_strided_logits_and_a_broadcast_gradient(triton_device):
    wide_TE = torch.randn(14, 32, generator=torch.Generator().manual_seed(10)).to(triton_device)
    strided_TE = wide_TE[::2, ::2].requires_grad_()
    dense_TE = strided_TE.detach().contiguous().requires_grad_()
    for logits_TE in (strided_TE, dense_TE):
        route(logits_TE, 2)[1].sum().backward()  # the gradient of a sum has strides of zero
    assert torch.equal(strided_TE.grad, dense_TE.grad)


def test_saves_logits_and_ids_only(triton_device):
    saved = []
    logits_TE = torch.randn(7, 16, device=triton_device, requires_grad=True)
    bias_E = torch.zeros(16, device=triton_device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ids_TK, _, _ = route(logits_TE, 2, score="sigmoid", renormalize=True, bias_E=bias_E)
    assert len(saved) == 2
    assert saved[0].data_ptr() == logits_TE.data_ptr() and torch.equal(saved[1], ids_TK)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile_traces_one_graph(backend, triton_device):
    bias_E = torch.zeros(16, device=triton_device)

    def weigh(logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        options = {"score": "sigmoid", "renormalize": True, "num_groups": 4, "top_groups": 2}
        return topk_route(logits_TE, 2, bias_E=bias_E, backend=backend, **options)

    compiled = torch.compile(weigh, fullgraph=True, backend="aot_eager")
    for T in (7, 12):  # the second size makes the shape dynamic
        logits_TE = torch.randn(T, 16, device=triton_device, requires_grad=True)
        actual, expected = compiled(logits_TE), weigh(logits_TE)
        cotangent_TK = torch.randn(T, 2, device=triton_device)
        grads = [gradients(run[1], cotangent_TK, logits=logits_TE)["logits"] for run in (actual, expected)]
        assert all(torch.equal(a, e) for a, e in zip((*actual, grads[0]), (*expected, grads[1]), strict=True))


def test_custom_ops_keep_torchs_rules(triton_device):
    route(torch.zeros(1, 1, device=triton_device), 1)  # registers the operators
    logits_TE = torch.randn(7, 16, device=triton_device, requires_grad=True)
    bias_E = torch.zeros(16, device=triton_device)
    # Not test_aot_dispatch_dynamic, which cannot add up outputs of which the first is an integer.
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    for sums_of, num_sequences in ((None, 1), ("sigmoid", 7)):
        forward = (logits_TE, bias_E, 2, "sigmoid", "sigmoid_share", 1.0, 1, 1, sums_of, num_sequences)
        torch.library.opcheck(torch.ops.joulemoe.topk_route.default, forward, test_utils=rules)
    ids_TK = route(logits_TE, 2)[0]
    grad_TK, grad_sums_BX = torch.randn(7, 2, device=triton_device), torch.randn(7, 17, device=triton_device)
    backward = (grad_TK, grad_sums_BX, logits_TE.detach(), ids_TK, "softmax_of_all", "softmax", 1.0)
    torch.library.opcheck(torch.ops.joulemoe.topk_route_backward.default, backward)


@pytest.mark.parametrize(
    ("shape", "top_k", "dtype", "message"),
    [
        ((2, 1025), 1, torch.float32, "at most 1024 experts with top_k up to 16, got 1025 and 1"),
        ((2, 32), 17, torch.float32, "at most 1024 experts with top_k up to 16, got 32 and 17"),
        ((2, 32), 1, torch.float64, "takes logits of float32, bfloat16, float16, got torch.float64"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_and_torch_does_it(shape, top_k, dtype, message, triton_device):
    logits_TE = torch.zeros(shape, dtype=dtype, device=triton_device)
    with pytest.raises(ValueError, match=message):
        route(logits_TE, top_k)
    assert topk_route(logits_TE, top_k, backend="torch")[0].tolist() == [list(range(top_k))] * 2
