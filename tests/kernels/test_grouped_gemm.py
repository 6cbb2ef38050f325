"""grouped_gemm on both backends against its reference in float64, with and without gathering."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import gradients
from routed_pairs import ROUTINGS, some_ids
from tolerances import assert_as_good_as_plain, assert_close
from torch import Tensor

from moe.kernels.grouped_gemm import grouped_gemm
from moe.kernels.grouped_gemm.reference import grouped_gemm_reference
from moe.kernels.permute_index import permute_index

pytestmark = pytest.mark.usefixtures("poison_empty")

D, F = 24, 40
Named = dict[str, Tensor]


def inputs(num_rows: int, E: int, dtype: torch.dtype, sizes: tuple[int, int] = (D, F)) -> Named:
    generator = torch.Generator().manual_seed(num_rows + E)
    width, out = sizes
    x = torch.randn(num_rows, width, generator=generator)
    w = torch.randn(E, out, width, generator=generator) / width**0.5
    return {"x": x.to(dtype).requires_grad_(), "w": w.to(dtype).requires_grad_()}


def run(op: Any, tensors: Named, ends_e: Tensor, cotangent: Tensor, **options: Any) -> Named:
    """The output's rows of experts, and the gradients; the other rows mean nothing."""
    out = op(*tensors.values(), ends_e, **options)
    grads = gradients(out, cotangent, **tensors)
    return {"out": out.detach()[: int(ends_e[-1])], **grads}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gathers", [True, False], ids=["gather", "rows"])
@pytest.mark.parametrize("routing", [*ROUTINGS.values(), (8, some_ids(300, 8, 2))], ids=[*ROUTINGS, "many"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equals_the_reference(backend, routing, gathers, dtype, triton_device):
    E, ids_TK = routing
    T, K = ids_TK.shape
    device = triton_device if backend == "triton" else "cpu"
    order_N, inverse_N, ends_e = (t.to(device) for t in permute_index(ids_TK.flatten(), E))
    options = {"gather": (order_N, inverse_N), "top_k": K} if gathers else {}
    tensors = {n: t.detach().to(device) for n, t in inputs(T if gathers else T * K, E, dtype).items()}
    cotangent = torch.randn(T * K, F, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    # What the gradient of a row of no expert is does not matter.
    exact_cotangent = cotangent.clone()
    exact_cotangent[int(ends_e[-1]) :] = 0

    def leaves(dtype: torch.dtype) -> Named:
        return {n: t.to(dtype).requires_grad_() for n, t in tensors.items()}

    actual = run(grouped_gemm, leaves(dtype), ends_e, cotangent, backend=backend, **options)
    plain = run(grouped_gemm_reference, leaves(dtype), ends_e, exact_cotangent, **options)
    exact = run(grouped_gemm_reference, leaves(torch.float64), ends_e, exact_cotangent.double(), **options)
    for name, tensor in actual.items():
        assert tensor.dtype == dtype
        assert_as_good_as_plain(name, tensor, plain[name], exact[name], dtype=dtype)
        assert_close(name, tensor, exact[name])
    for expert in range(E):
        assert_close(f"w.grad of expert {expert}", actual["w"][expert], exact["w"][expert])


@pytest.mark.parametrize("sizes", [(33, 7), (1, 1), (65, 129)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_odd_sizes(backend, sizes, triton_device):
    device = triton_device if backend == "triton" else "cpu"
    tensors = {
        n: t.detach().to(device).requires_grad_() for n, t in inputs(20, 3, torch.float32, sizes).items()
    }
    ends_e = torch.tensor([3, 3, 20], dtype=torch.int32, device=device)
    cotangent = torch.randn(20, sizes[1], generator=torch.Generator().manual_seed(1)).to(device)
    actual = run(grouped_gemm, tensors, ends_e, cotangent, backend=backend)
    exact = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    for name, tensor in run(grouped_gemm_reference, exact, ends_e, cotangent.double()).items():
        assert_close(name, actual[name], tensor)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_main_grad_takes_the_sum_of_micro_batches(backend, triton_device):
    device = triton_device if backend == "triton" else "cpu"
    tensors = {n: t.detach().to(device).requires_grad_() for n, t in inputs(20, 3, torch.bfloat16).items()}
    ends_e = torch.tensor([3, 3, 20], dtype=torch.int32, device=device)
    main_grad = torch.full((3, F, D), 0.5, device=device)
    cotangents = torch.randn(2, 20, F, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    expected = main_grad.double()
    for cotangent in cotangents:
        out = grouped_gemm(*tensors.values(), ends_e, main_grad_eFD=main_grad, backend=backend)
        out.backward(cotangent)
        exact = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
        expected += run(grouped_gemm_reference, exact, ends_e, cotangent.double())["w"]
    assert tensors["w"].grad is None and tensors["x"].grad is not None
    # Not rounded to bf16 in between on Triton; torch's products are.
    assert_close(
        "main_grad", main_grad, expected, dtype=torch.float32 if backend == "triton" else torch.bfloat16
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile_traces_one_graph_and_opcheck(backend, triton_device):
    device = triton_device if backend == "triton" else "cpu"
    order_N, inverse_N, ends_e = (t.to(device) for t in permute_index(some_ids(6, 3, 2).flatten(), 3))
    tensors = {n: t.detach().to(device).requires_grad_() for n, t in inputs(6, 3, torch.float32).items()}

    def forward(x: Tensor, w: Tensor, ends_e: Tensor) -> Tensor:
        return grouped_gemm(x * 2, w, ends_e, gather=(order_N, inverse_N), top_k=2, backend=backend)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    cotangent = torch.ones(12, F, device=device)
    actual, expected = (run(f, tensors, ends_e, cotangent) for f in (compiled, forward))
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    arguments = (*tensors.values(), ends_e, order_N, inverse_N, None, 2, backend)
    torch.library.opcheck(torch.ops.joulemoe.grouped_gemm.default, arguments)


ENDS = torch.tensor([1, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("x", "w", "ends_e", "options", "message"),
    [
        ((3, 8), (2, 4, 7), ENDS, {}, r"expected x \[T, D\] and w \[e, F, D\], got \(3, 8\) and \(2, 4, 7\)"),
        ((3, 8), (2, 4, 8), ENDS[:1], {}, r"ends must be int32 of shape \[2\], got torch.int32 \(1,\)"),
        ((3, 8), (2, 4, 8), ENDS.long(), {}, r"ends must be int32 of shape \[2\], got torch.int64"),
        ((3, 8), (2, 4, 8), ENDS, {"top_k": 2}, "top_k=2 needs gather"),
        (
            (3, 8),
            (2, 4, 8),
            ENDS,
            {"top_k": 2, "gather": (torch.arange(6), torch.arange(3))},
            r"inverse must hold 6 rows, got shape \(3,\)",
        ),
        (
            (3, 8),
            (2, 4, 8),
            ENDS,
            {"main_grad_eFD": torch.zeros(2, 8, 4)},
            r"main_grad must have the weight's shape \(2, 4, 8\), got \(2, 8, 4\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(x, w, ends_e, options, message):
    with pytest.raises(ValueError, match=message):
        grouped_gemm(torch.zeros(x), torch.zeros(w), ends_e, **options)
    with pytest.raises(ValueError, match=r"one dtype is needed, got x torch\.float32 and w torch\.float64"):
        grouped_gemm(torch.zeros(3, 8), torch.zeros(2, 4, 8).double(), ENDS)
