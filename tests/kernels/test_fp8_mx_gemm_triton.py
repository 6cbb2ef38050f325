"""Grouped GEMMs in MXFP8: the interpreter (or a B200) against exact products, and the compile gate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compile_gate import Request, assert_fits, compile_in_subprocess
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

FOLDER = Path(__file__).parents[2] / "kernels"
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
    T, (_, N, K) = x_TK.shape[0], w_eNK.shape
    if transposed:
        x_TK = torch.randn(T, N, device=triton_device)
    a = quantize_rows(x_TK, format="mxfp8")
    w, maps = mx_weight(w_eNK, transposed=transposed), TileMaps(ends_e, 2 * T)
    options = {"out_dtype": torch.float32, "order_R": order_R, "top_k": 2}
    out = launch_mx_gemm(a, w, K if transposed else N, maps, **options)
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


def requests() -> list[Request]:
    """Every MXFP8 kernel at the sizes of Qwen3-30B-A3B, for sm_100."""
    from moe.kernels.expert_mlp.mx_kernel import GRAD_H_TILE, UP_TILE
    from moe.kernels.grouped_gemm.mx_kernel import TILE

    D, F, E = 2048, 768, 128
    values, scales, wide, h = "*fp8e4nv:16", "*u8:16", "*fp32:16", "*bf16:16"
    index = {"p_order": "*i64:16", "p_ends": "*i32:16", "p_map": "*i32:16"}
    w = {"p_w": values, "p_w_scales": scales}
    gemm = {"p_a": values, "p_a_scales": scales, "p_out": h} | w | index
    wgrad = {"p_left": values, "p_left_scales": scales, "p_right": values, "p_right_scales": scales}
    wgrad |= {"p_out": h, "p_ends": "*i32:16", "num_tiles": "i32"}
    up = {"p_x": values, "p_x_scales": scales, "p_a": values, "p_a_scales": scales} | w | index
    grad_h = {"p_grad": values, "p_grad_scales": scales, "p_weights": wide, "p_rows": values}
    grad_h |= {"p_row_scales": scales, "p_columns": values, "p_column_scales": scales, "p_a": values}
    grad_h |= {"p_a_scales": scales, "p_partials": wide, "num_tiles": "i32"} | w | index
    by_rows = {"TOP_K": 8, "D": D, "F": F, "W_STRIDES": (2 * F * D, D, 2 * F * D // 32, D // 32)}
    padded = (E + 1) * D  # columns of the transposed weight of all experts
    by_columns = by_rows | {"W_STRIDES": (D, padded, D // 32, padded // 32)}
    as_it_is, compressed = {"p_h": h}, {"p_h": values, "p_h_scales": scales}
    asked = (
        ("grouped_gemm", "mx_gemm_kernel", gemm, by_rows | {"N": 2 * F, "K": D}, TILE),
        ("grouped_gemm", "mx_wgrad_kernel", wgrad, {"M": D, "N": F, "E": E, "E_PAD": E}, TILE),
        ("expert_mlp", "mx_up_kernel", up | as_it_is, by_rows | {"p_h_scales": None}, UP_TILE),
        ("expert_mlp", "mx_up_kernel", up | compressed, by_rows, UP_TILE),
        ("expert_mlp", "mx_grad_h_kernel", grad_h | compressed, by_columns, GRAD_H_TILE),
    )
    found = []
    for folder, name, signature, constants, tile in asked:
        sizes = constants | {key: size for key, size in tile.items() if key.startswith("BLOCK")}
        if name == "mx_gemm_kernel":
            sizes = {key: size for key, size in sizes.items() if key not in {"D", "F"}}
        path, stages = FOLDER / folder / "mx_kernel.py", tile["num_stages"]
        found.append(Request(path, name, signature, sizes, tile["num_warps"], 100, stages))
    return found


def test_shipped_configurations_fit_sm_100():
    for compiled in compile_in_subprocess(requests()):
        assert_fits(compiled, instructions=["UTCQMMA"])
        assert compiled.count("ATOM") == compiled.count("ATOMG") == compiled.count("RED") == 0
