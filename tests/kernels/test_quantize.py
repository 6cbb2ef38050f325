"""What quantisation promises: the reference by its properties, the torch backend by the reference."""

from __future__ import annotations

import math

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
from moe.kernels.quantize.torch_backend import dequantize_columns, dequantize_rows, dequantize_weights

SQUARE_FORMATS = ("fp8", "fp8_power_of_two")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-9, 9, math.prod(shape[:-1])).view(*shape[:-1], 1)
    return torch.randn(*shape, generator=generator) * sizes


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, a, e in zip(("values", "scales"), actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape, name
        bits = torch.uint8 if a.element_size() == 1 else torch.int32
        assert torch.equal(a.view(bits), e.view(bits)), name


def test_values_of_one_block_by_hand():
    x_RC = torch.tensor([[448.0, -224.0, 1.0, 0.0], [0.875, 0.4375, -0.001953125, 0.01]])
    values_RC, scales_RB = quantize_rows_reference(x_RC)
    assert scales_RB.tolist() == [[1.0], [0.001953125]]
    # 0.01 is 5.12 of the scale, between 5 and 5.5.
    assert values_RC.float().tolist() == [[448.0, -224.0, 1.0, 0.0], [448.0, 224.0, -1.0, 5.0]]


@pytest.mark.parametrize("format", FORMATS)
def test_an_element_is_off_by_half_a_step_at_most(format):
    x_RC, kind = numbers(20, 256), FORMATS[format]
    values_RC, scales_RB = quantize_rows_reference(x_RC, format)
    assert values_RC.float().isfinite().all()
    wide_RC = scales_RB.float().repeat_interleave(kind.block, dim=1)
    error_RC = (dequantize_rows(values_RC, scales_RB, kind) - x_RC).abs()
    # Three bits after the leading one; below 2**-6 of the scale the step is 2**-9.
    assert (error_RC <= torch.maximum(x_RC.abs() * 2**-4, wide_RC * 2**-10) * 1.000001).all()
    largest_RB = values_RC.float().abs().unflatten(1, (-1, kind.block)).amax(dim=2)
    assert ((largest_RB >= 208) if kind.power_of_two else (largest_RB == 448)).all()


@pytest.mark.parametrize("format", ["fp8_power_of_two", "mxfp8"])
def test_powers_of_two_have_no_mantissa_and_are_the_smallest_that_fit(format):
    _, scales_RB = quantize_rows_reference(torch.tensor([[448.0], [448.1], [1e-30], [3e38], [1.0]]), format)
    mantissa, exponent = torch.frexp(scales_RB.float())
    assert (mantissa == 0.5).all()
    assert (exponent - 1).flatten().tolist() == [0, 1, -108, 120, -8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("R", "C"), [(0, 5), (1, 1), (7, 33), (3, 128), (2, 300)])
def test_rows_equal_the_reference(R, C, format, dtype):
    x_RC = numbers(R, C).clamp(-6e4, 6e4).to(dtype)
    assert_same_bits(quantize_rows(x_RC, format=format), quantize_rows_reference(x_RC, format))


@pytest.mark.parametrize("format", SQUARE_FORMATS)
@pytest.mark.parametrize(("e", "N", "K"), [(1, 1, 1), (2, 129, 40), (3, 128, 256)])
def test_weights_equal_the_reference(e, N, K, format):
    w_eNK = numbers(e, N, K).bfloat16()
    for transposed in (True, False):
        actual = quantize_weights(w_eNK, transposed=transposed, format=format)
        assert_same_bits(actual, quantize_weights_reference(w_eNK, format, transposed=transposed))
    error = (dequantize_weights(*actual, FORMATS[format]) - w_eNK.float()).abs()
    assert error.max() <= w_eNK.float().abs().max() * 2**-4


ENDS = {"uneven": [3, 130, 259, 300], "empty": [0, 5, 5, 5], "sentinels": [2, 100, 140, 200], "none": [0] * 4}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_columns_equal_the_reference(ends, format):
    x_RC, ends_e = numbers(300, 3), torch.tensor(ends, dtype=torch.int32)
    values_CP, scales_CB = quantize_columns(x_RC, ends_e, format=format)
    assert_same_bits((values_CP, scales_CB), quantize_columns_reference(x_RC, ends_e, format))
    kind = FORMATS[format]
    assert values_CP.shape == (3, (300 // 128 + 4) * 128)
    back_RC = dequantize_columns(values_CP, scales_CB, ends_e, 300, kind)
    assert back_RC[ends[-1] :].count_nonzero() == 0
    assert ((back_RC - x_RC)[: ends[-1]].abs() <= x_RC.abs().max() * 2**-4).all()


def test_experts_never_share_a_block():
    ends_e = torch.tensor([3, 9], dtype=torch.int32)
    x_RC = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    first_CP, first_CB = quantize_columns(x_RC, ends_e)
    x_RC[3:] *= 1e6
    second_CP, second_CB = quantize_columns(x_RC, ends_e)
    assert torch.equal(first_CP[:, :128].float(), second_CP[:, :128].float())
    assert torch.equal(first_CB[:, 0], second_CB[:, 0])
    assert (second_CB[:, 1] > first_CB[:, 1]).all()


def test_an_order_gathers_rows():
    x_TC, ends_e = numbers(50, 5), torch.tensor([40, 40, 95], dtype=torch.int32)
    order_R = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    gathered = quantize_columns(x_TC[order_R // 2], ends_e)
    assert_same_bits(quantize_columns(x_TC, ends_e, order_R, 2), gathered)


@pytest.mark.parametrize("run", [quantize_rows, quantize_rows_reference])
@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zero_and_what_is_not_finite_spoils_its_block(format, run):
    block = FORMATS[format].block
    x_RC = torch.ones(4, 2 * block)
    x_RC[0, :block] = 0
    x_RC[1, 3], x_RC[2, 3], x_RC[3, 3] = torch.nan, torch.inf, -torch.inf
    back_RC = dequantize_rows(*run(x_RC, format=format), FORMATS[format])
    assert torch.equal(back_RC[0], x_RC[0])
    assert back_RC[1:, :block].isnan().all()
    assert torch.equal(back_RC[1:, block:], x_RC[1:, block:])


def test_no_gradient_passes():
    x_RC = torch.ones(2, 4, requires_grad=True)
    ends_e = torch.tensor([2], dtype=torch.int32)
    outputs = (*quantize_rows(x_RC), *quantize_columns(x_RC, ends_e), *quantize_weights(x_RC.unsqueeze(0)))
    assert not any(output.requires_grad for output in outputs)


def test_what_does_not_fit_is_refused():
    x_RC, ends_e = torch.ones(2, 4), torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"format='fp4' is unknown; allowed: fp8, fp8_power_of_two, mxfp8"):
        quantize_rows(x_RC, format="fp4")
    with pytest.raises(ValueError, match=r"x must have 2 dimensions.*got torch.float64 of shape \(2, 4\)"):
        quantize_rows(x_RC.double())
    with pytest.raises(ValueError, match=r"none after the first empty.*shape \(2, 0\)"):
        quantize_rows(torch.ones(2, 0))
    with pytest.raises(ValueError, match=r"'mxfp8' has no square blocks"):
        quantize_weights(torch.ones(1, 2, 3), format="mxfp8")
    with pytest.raises(ValueError, match=r"ends must be an int32 vector, got torch.int64 of shape \(1,\)"):
        quantize_columns(x_RC, ends_e.long())
    with pytest.raises(ValueError, match=r"order must hold 4 rows, got \(3,\)"):
        quantize_columns(x_RC, ends_e, torch.arange(3), 2)
    with pytest.raises(ValueError, match=r"backend='cuda' is unknown"):
        quantize_rows(x_RC, backend="cuda")
