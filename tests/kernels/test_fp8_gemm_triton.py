"""Grouped GEMMs in FP8: the interpreter (or a GPU) against exact products, and the compile gate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compile_gate import Request, assert_fits, compile_in_subprocess
from fp8_operands import CASES, example, sums_of_rows
from tolerances import LARGEST_DIFFERENCE, assert_close, difference

from moe.kernels.grouped_gemm.reference import grouped_gemm_reference
from moe.kernels.quantize import quantize_columns, quantize_rows, quantize_weights
from moe.kernels.quantize.formats import FORMATS
from moe.kernels.quantize.torch_backend import dequantize_columns, dequantize_rows, dequantize_weights

pytestmark = pytest.mark.usefixtures("poison_empty")

KERNELS = Path(__file__).parents[2] / "kernels" / "grouped_gemm" / "fp8_kernel.py"
FP8 = FORMATS["fp8"]
ALLOWED = LARGEST_DIFFERENCE[torch.float8_e4m3fn]


@pytest.mark.parametrize("gathered", [False, True], ids=["in order", "gathered"])
@pytest.mark.parametrize("case", CASES)
def test_gemm_equals_that_of_dequantised_operands(case, gathered, triton_device):
    from moe.kernels.grouped_gemm.fp8_kernel import TileMaps, launch_fp8_gemm

    top_k = 2 if gathered else 1
    x_TK, w_eNK, ends_e, order_R = example(case, triton_device, top_k)
    a, w = quantize_rows(x_TK), quantize_weights(w_eNK)
    out_RN = launch_fp8_gemm(
        a,
        w,
        TileMaps(ends_e, order_R.numel()),
        out_dtype=torch.float32,
        order_R=order_R if gathered else None,
        top_k=top_k,
    )
    gather = (order_R, order_R.argsort()) if gathered else None
    operands = dequantize_rows(*a, FP8), dequantize_weights(*w, FP8)
    expected_RN = grouped_gemm_reference(*(t.double() for t in operands), ends_e, gather=gather, top_k=top_k)
    rows = int(ends_e[-1])
    assert_close("out", out_RN[:rows], expected_RN[:rows])
    exact_RN = grouped_gemm_reference(x_TK.double(), w_eNK.double(), ends_e, gather=gather, top_k=top_k)
    if exact_RN.numel() > 1000:
        assert difference(out_RN[:rows], exact_RN[:rows]) < ALLOWED


@pytest.mark.parametrize("case", CASES)
def test_a_transposed_weight_keeps_its_scales(case, triton_device):
    from moe.kernels.grouped_gemm.fp8_kernel import TileMaps, launch_fp8_gemm

    _, w_eNK, ends_e, _ = example(case, triton_device)
    grad_RN = torch.randn(CASES[case][0], w_eNK.shape[1], device=triton_device)
    a, w = quantize_rows(grad_RN), quantize_weights(w_eNK, transposed=True)
    out_RK = launch_fp8_gemm(
        a,
        w,
        TileMaps(ends_e, grad_RN.shape[0]),
        out_dtype=torch.float32,
        scales_are_kn=True,
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
    from moe.kernels.grouped_gemm.fp8_kernel import TileMaps, launch_fp8_gemm

    x_TK, w_eNK, ends_e, _ = example("uneven", triton_device)
    x_TK[4, 200] = torch.inf
    maps = TileMaps(ends_e, x_TK.shape[0])
    w = quantize_weights(w_eNK)
    out_RN = launch_fp8_gemm(quantize_rows(x_TK), w, maps, out_dtype=torch.float32)
    assert out_RN[4].isnan().all()
    out_RN[4] = 0
    assert out_RN.isfinite().all()


def requests_for(capability: int) -> list[Request]:
    from moe.kernels.grouped_gemm.fp8_kernel import gemm_tile, wgrad_tile

    requests = []
    values, scales = "*fp8e4nv:16", "*fp32:16"
    gemm = {"p_a": values, "p_a_scales": scales, "p_w": values, "p_w_scales": scales, "p_out": "*bf16:16"}
    gemm |= {"p_ends": "*i32:16", "p_map": "*i32:16"}
    for rows_per_expert, N, K, gathers in (
        (2048, 2048, 768, True),
        (32, 7168, 4096, True),
        (1024, 2048, 2064, False),
    ):
        tile = gemm_tile(rows_per_expert, N)
        options = tile.pop("num_warps"), capability, tile.pop("num_stages")
        constants = {"TOP_K": 8, "N": N, "K": K, "SCALES_ARE_KN": not gathers} | tile
        signature = gemm | {"p_order": "*i64:16"} if gathers else gemm
        constants |= {} if gathers else {"p_order": None}
        requests.append(Request(KERNELS, "fp8_gemm_kernel", signature, constants, *options))
    wgrad = {"p_left": values, "p_left_scales": scales, "p_right": values, "p_right_scales": scales}
    wgrad |= {"p_out": "*bf16:16", "p_ends": "*i32:16", "num_tiles": "i32"}
    for M, N, E in ((2048, 768, 128), (4096, 7168, 256), (64, 64, 8)):
        tile = wgrad_tile(M, N)
        options = tile.pop("num_warps"), capability, tile.pop("num_stages")
        constants = {"M": M, "N": N, "E": E, "E_PAD": E} | tile
        requests.append(Request(KERNELS, "fp8_wgrad_kernel", wgrad, constants, *options))
    return requests


def test_shipped_configurations_fit_both_architectures():
    requests = requests_for(90) + requests_for(100)
    for request, compiled in zip(requests, compile_in_subprocess(requests), strict=True):
        assert_fits(compiled, instructions=["QGMMA" if request.capability == 90 else "UTCQMMA"])
        assert compiled.count("ATOM") == compiled.count("ATOMG") == compiled.count("RED") == 0
