"""Grouped GEMMs in FP8: the interpreter (or a GPU) against exact products."""

from __future__ import annotations

import pytest
import torch
from fp8_operands import CASES, example, sums_of_rows
from tolerances import LARGEST_DIFFERENCE, assert_close, difference

from moe.kernels.grouped_gemm.reference import grouped_gemm_reference
from moe.kernels.quantize import quantize_columns, quantize_rows, quantize_weights
from moe.kernels.quantize.formats import FORMATS
from moe.kernels.quantize.torch_backend import dequantize_columns, dequantize_rows, dequantize_weights

pytestmark = pytest.mark.usefixtures("poison_empty")

FP8 = FORMATS["fp8"]
ALLOWED = LARGEST_DIFFERENCE[torch.float8_e4m3fn]


@pytest.mark.parametrize("gathered", [False, True], ids=["in order", "gathered"])
@pytest.mark.parametrize("case", CASES)
def test_gemm_equals_that_of_dequantised_operands(case, gathered, triton_device):
    from moe.kernels.grouped_gemm.fp8_kernel import TileMaps, fp8_weight, launch_fp8_gemm

    top_k = 2 if gathered else 1
    x_TK, w_eNK, ends_e, order_R = example(case, triton_device, top_k)
    a, w = quantize_rows(x_TK), fp8_weight(w_eNK)
    out_RN = launch_fp8_gemm(
        a,
        w,
        TileMaps(ends_e, order_R.numel()),
        out_dtype=torch.float32,
        order_R=order_R if gathered else None,
        top_k=top_k,
    )
    gather = (order_R, order_R.argsort()) if gathered else None
    operands = dequantize_rows(*a, FP8), dequantize_weights(*quantize_weights(w_eNK), FP8)
    expected_RN = grouped_gemm_reference(*(t.double() for t in operands), ends_e, gather=gather, top_k=top_k)
    rows = int(ends_e[-1])
    assert_close("out", out_RN[:rows], expected_RN[:rows])
    exact_RN = grouped_gemm_reference(x_TK.double(), w_eNK.double(), ends_e, gather=gather, top_k=top_k)
    if exact_RN.numel() > 1000:
        assert difference(out_RN[:rows], exact_RN[:rows]) < ALLOWED


@pytest.mark.parametrize("case", CASES)
def test_a_transposed_weight_keeps_its_scales(case, triton_device):
    from moe.kernels.grouped_gemm.fp8_kernel import TileMaps, fp8_weight, launch_fp8_gemm

    _, w_eNK, ends_e, _ = example(case, triton_device)
    grad_RN = torch.randn(CASES[case][0], w_eNK.shape[1], device=triton_device)
    a, w = quantize_rows(grad_RN), fp8_weight(w_eNK, transposed=True)
    out_RK = launch_fp8_gemm(
        a,
        w,
        TileMaps(ends_e, grad_RN.shape[0]),
        out_dtype=torch.float32,
    )
    w_eKN = dequantize_weights(*quantize_weights(w_eNK), FP8).transpose(1, 2)
    operands = dequantize_rows(*a, FP8), w_eKN
    expected_RK = grouped_gemm_reference(*(t.double() for t in operands), ends_e)
    assert_close("out", out_RK[: ends_e[-1]], expected_RK[: ends_e[-1]])


@pytest.mark.parametrize("case", CASES)
def test_wgrad_equals_that_of_dequantised_operands(case, triton_device):
    from moe.kernels.grouped_gemm.fp8_kernel import launch_fp8_wgrad

    x_TK, w_eNK, ends_e, order_R = example(case, triton_device, 2)
    grad_RN = torch.randn(order_R.numel(), w_eNK.shape[1], device=triton_device)
    left, right = quantize_columns(grad_RN, ends_e), quantize_columns(x_TK, ends_e, order_R, 2)
    out_eNK = launch_fp8_wgrad(left, right, ends_e, out_dtype=torch.float32)
    grad, x = (
        dequantize_columns(*operand, ends_e, order_R.numel(), FP8).double() for operand in (left, right)
    )
    assert_close("out", out_eNK, sums_of_rows(grad, x, ends_e))
    exact_eNK = sums_of_rows(grad_RN.double(), x_TK[order_R // 2].double(), ends_e)
    assert difference(out_eNK, exact_eNK) < ALLOWED


def test_what_is_not_finite_reaches_the_product(triton_device):
    from moe.kernels.grouped_gemm.fp8_kernel import TileMaps, fp8_weight, launch_fp8_gemm

    x_TK, w_eNK, ends_e, _ = example("uneven", triton_device)
    x_TK[4, 200] = torch.inf
    maps = TileMaps(ends_e, x_TK.shape[0])
    w = fp8_weight(w_eNK)
    out_RN = launch_fp8_gemm(quantize_rows(x_TK), w, maps, out_dtype=torch.float32)
    assert out_RN[4].isnan().all()
    out_RN[4] = 0
    assert out_RN.isfinite().all()
