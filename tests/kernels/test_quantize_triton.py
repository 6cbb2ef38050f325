"""The quantising kernels: the interpreter (or a GPU) has the reference's bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.kernels.quantize import quantize_columns, quantize_rows, quantize_weights
from moe.kernels.quantize.formats import FORMATS
from moe.kernels.quantize.reference import (
    quantize_columns_reference,
    quantize_rows_reference,
    quantize_weights_reference,
)
from moe.kernels.quantize.torch_backend import dequantize_rows

pytestmark = pytest.mark.usefixtures("poison_empty")

SQUARE_FORMATS = ("fp8", "fp8_power_of_two")
ENDS = {
    "uneven": [3, 130, 259, 300],
    "empty": [0, 5, 5, 5],
    "one_hot": [0, 0, 300, 300],
    "sentinels": [2, 100, 140, 200],
    "none": [0] * 4,
    "one_expert": [300],
}


def numbers(*shape: int) -> Tensor:
    """Rows of very different sizes."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return x * torch.logspace(-9, 4, x[..., 0].numel()).view(*shape[:-1], 1)


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype and a.shape == e.shape, f"output {i}"
        bits = torch.uint8 if a.element_size() == 1 else torch.int32
        assert torch.equal(a.cpu().view(bits), e.view(bits)), f"output {i}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("R", "C"), [(0, 5), (1, 1), (7, 33), (17, 128), (2, 300), (1, 1100)])
def test_rows_equal_the_reference(R, C, format, dtype, triton_device):
    x_RC = numbers(R, C).to(dtype)
    actual = quantize_rows(x_RC.to(triton_device), format=format, backend="triton")
    assert_same_bits(actual, quantize_rows_reference(x_RC, format))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", SQUARE_FORMATS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 129, 40), (3, 128, 256)], ids=str)
def test_weights_equal_the_reference(shape, format, dtype, triton_device):
    w_eNK = numbers(*shape).to(dtype)
    for transposed in (False, True):
        actual = quantize_weights(
            w_eNK.to(triton_device), transposed=transposed, format=format, backend="triton"
        )
        assert_same_bits(actual, quantize_weights_reference(w_eNK, format, transposed=transposed))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_columns_equal_the_reference(ends, format, triton_device):
    x_RC, ends_e = numbers(300, 67).bfloat16(), torch.tensor(ends, dtype=torch.int32)
    actual = quantize_columns(
        x_RC.to(triton_device), ends_e.to(triton_device), format=format, backend="triton"
    )
    assert_same_bits(actual, quantize_columns_reference(x_RC, ends_e, format))


@pytest.mark.parametrize(("T", "K"), [(0, 2), (1, 1), (75, 4)])
def test_an_order_gathers_rows(T, K, triton_device):
    x_TC, ends_e = numbers(T, 5), torch.tensor([T, T, T * K], dtype=torch.int32)
    order_R = torch.randperm(T * K, generator=torch.Generator().manual_seed(0))
    on_device = (t.to(triton_device) for t in (x_TC, ends_e, order_R))
    actual = quantize_columns(*on_device, K, backend="triton")
    assert_same_bits(actual, quantize_columns_reference(x_TC[order_R // K], ends_e))


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zero_and_what_is_not_finite_spoils_its_block(format, triton_device):
    block = FORMATS[format].block
    x_RC = torch.ones(4, 2 * block, device=triton_device)
    x_RC[0, :block] = 0
    x_RC[1, 3], x_RC[2, 3], x_RC[3, 3] = torch.nan, torch.inf, -torch.inf
    back_RC = dequantize_rows(*quantize_rows(x_RC, format=format, backend="triton"), FORMATS[format])
    assert torch.equal(back_RC[0], x_RC[0])
    assert back_RC[1:, :block].isnan().all()
    assert torch.equal(back_RC[1:, block:], x_RC[1:, block:])


def test_every_second_row_of_a_tensor_will_do(triton_device):
    x_RC = numbers(20, 40)
    actual = quantize_rows(x_RC.to(triton_device)[::2], backend="triton")
    assert_same_bits(actual, quantize_rows_reference(x_RC[::2]))


def all_three(x_RC: Tensor, ends_e: Tensor, *, backend: str) -> tuple[Tensor, ...]:
    weights = quantize_weights(x_RC.unsqueeze(0), transposed=True, backend=backend)
    rows = quantize_rows(x_RC, format="mxfp8", backend=backend)
    columns = quantize_columns(x_RC, ends_e, format="mxfp8", backend=backend)
    # fp32, because torch.compile does not pass every narrow dtype on.
    return tuple(output.float() for output in (*weights, *rows, *columns))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile_traces_one_graph(backend, triton_device):
    compiled = torch.compile(all_three, fullgraph=True, backend="aot_eager")
    for R in (7, 150):  # the second size makes the shape dynamic
        x_RC = numbers(R, 33).to(triton_device)
        ends_e = torch.tensor([2, R], dtype=torch.int32, device=triton_device)
        actual, expected = (run(x_RC, ends_e, backend=backend) for run in (compiled, all_three))
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_custom_ops_keep_torchs_rules(triton_device):
    x_RC = numbers(7, 33).to(triton_device)
    ends_e = torch.tensor([2, 7], dtype=torch.int32, device=triton_device)
    ops = torch.ops.joulemoe
    torch.library.opcheck(ops.quantize_rows.default, (x_RC, "fp8"))
    torch.library.opcheck(ops.quantize_columns.default, (x_RC, ends_e, None, 1, "fp8"))
    torch.library.opcheck(ops.quantize_weights.default, (x_RC.unsqueeze(0), True, "fp8"))
