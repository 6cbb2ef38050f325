"""Grouped GEMMs in MXFP8: the interpreter (or a B200) against exact products."""

from __future__ import annotations

import pytest
import torch
from fp8_operands import CASES, example, sums_of_rows
from tolerances import LARGEST_DIFFERENCE, assert_close, difference
from torch import Tensor

from moe.kernels.grouped_gemm.reference import grouped_gemm_reference
from moe.kernels.quantize import quantize_columns, quantize_rows
from moe.kernels.quantize.formats import FORMATS
from moe.kernels.quantize.torch_backend import dequantize_columns, dequantize_rows

too_old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (10, 0)
on_sm_100 = pytest.mark.skipif(too_old, reason="this GPU's tensor cores do not know the scales of MXFP8")
pytestmark = pytest.mark.usefixtures("poison_empty")

MX = FORMATS["mxfp8"]
ALLOWED = LARGEST_DIFFERENCE[torch.float8_e4m3fn]


def dequantized(x_RC: Tensor) -> Tensor:
    return dequantize_rows(*quantize_rows(x_RC, format="mxfp8"), MX).double()


@on_sm_100
@pytest.mark.parametrize("transposed", [False, True], ids=["over K", "over N"])
@pytest.mark.parametrize("case", CASES)
def test_gemm_equals_that_of_dequantised_operands(case, transposed, triton_device):
    from moe.kernels.grouped_gemm.mx_kernel import TileMaps, launch_mx_gemm, mx_weight

    x_TK, w_eNK, ends_e, order_R = example(case, triton_device, 2)
    T, (_, N, _) = x_TK.shape[0], w_eNK.shape
    if transposed:
        x_TK = torch.randn(T, N, device=triton_device)
    a = quantize_rows(x_TK, format="mxfp8")
    w, maps = mx_weight(w_eNK, transposed=transposed), TileMaps(ends_e, 2 * T)
    options = {"out_dtype": torch.float32, "order_R": order_R, "top_k": 2}
    out = launch_mx_gemm(a, w, maps, **options)
    oriented = [weight.T if transposed else weight for weight in w_eNK]
    w_wide = torch.stack([dequantized(weight) for weight in oriented])
    gather = (order_R, order_R.argsort())
    expected = grouped_gemm_reference(dequantized(x_TK), w_wide, ends_e, gather=gather, top_k=2)
    rows = slice(0, int(ends_e[-1]))
    assert_close("out", out[rows], expected[rows])
    exact = grouped_gemm_reference(
        x_TK.double(), torch.stack(oriented).double(), ends_e, gather=gather, top_k=2
    )
    if exact.numel() > 1000:
        assert difference(out[rows], exact[rows]) < ALLOWED


@on_sm_100
@pytest.mark.parametrize("case", CASES)
def test_wgrad_equals_that_of_dequantised_operands(case, triton_device):
    from moe.kernels.grouped_gemm.mx_kernel import launch_mx_wgrad

    x_TK, w_eNK, ends_e, order_R = example(case, triton_device, 2)
    grad_RN = torch.randn(order_R.numel(), w_eNK.shape[1], device=triton_device)
    left = quantize_columns(grad_RN, ends_e, format="mxfp8")
    right = quantize_columns(x_TK, ends_e, order_R, 2, format="mxfp8")
    out_eNK = launch_mx_wgrad(left, right, ends_e, out_dtype=torch.float32)
    wide = [dequantize_columns(*operand, ends_e, order_R.numel(), MX).double() for operand in (left, right)]
    assert_close("out", out_eNK, sums_of_rows(*wide, ends_e))
    exact_eNK = sums_of_rows(grad_RN.double(), x_TK[order_R // 2].double(), ends_e)
    assert difference(out_eNK, exact_eNK) < ALLOWED
