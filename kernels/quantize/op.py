"""Numbers to FP8 with a scale for every block: the public functions, checks, and backend.

Shapes: R rows, T rows before a gather, C columns, B blocks, e experts held here, N and K a weight's sides, P
padded rows. No gradient passes: the op that uses the result has a backward of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels.backend import choose_backend
from moe.kernels.quantize import torch_backend as plain
from moe.kernels.quantize import triton_op
from moe.kernels.quantize.formats import Quantized, format_named

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_rows(x_RC: Tensor, *, format: str = "fp8", backend: str = "auto") -> Quantized:
    """Blocks along each row, for a GEMM that sums over columns.

    Args:
        x_RC: fp32, bf16 or fp16.
        format: `fp8` (blocks of 128), `fp8_power_of_two` (the same, scales are powers of two) or `mxfp8`
            (blocks of 32). The last block of a row may be short.
        backend: `auto` (triton on CUDA, torch elsewhere), `triton` or `torch`; all give the same bits.

    Returns:
        values_RC in float8_e4m3fn and scales_RB in fp32, in float8_e8m0fnu for `mxfp8`: x is about values
        times the scale of their block. A block with NaN or infinity in it is NaN throughout.

    Raises:
        ValueError: for another shape, dtype or format, or if the backend cannot run here.
    """
    kind = format_named(format)
    _check("x", x_RC, 2)
    if choose_backend(backend, x_RC) == "torch":
        return Quantized(*plain.quantize_rows_torch(x_RC.detach(), kind))
    return Quantized(*triton_op.quantize_rows(x_RC.detach(), format))


def quantize_weights(
    w_eNK: Tensor, *, transposed: bool = False, format: str = "fp8", backend: str = "auto"
) -> Quantized:
    """Blocks of 128 x 128, which serve a GEMM that sums over K and one that sums over N.

    Args:
        w_eNK: fp32, bf16 or fp16.
        transposed: gives the same values as [e, K, N]: a tensor core of sm_90 wants the dimension that it
            sums over to be contiguous.
        format: `fp8` or `fp8_power_of_two`. The blocks of `mxfp8` have one dimension: quantise the rows of
            each orientation.
        backend: as in `quantize_rows`.

    Returns:
        values_eNK, or values_eKN, in float8_e4m3fn, and scales in fp32, [e, N / 128, K / 128] either way.

    Raises:
        ValueError: as in `quantize_rows`.
    """
    kind = format_named(format)
    if format == "mxfp8":
        raise ValueError("format='mxfp8' has no square blocks; quantise the rows of each orientation")
    _check("w", w_eNK, 3)
    if choose_backend(backend, w_eNK) == "torch":
        return Quantized(*plain.quantize_weights_torch(w_eNK.detach(), transposed, kind))
    return Quantized(*triton_op.quantize_weights(w_eNK.detach(), transposed, format))


def quantize_columns(
    x_TC: Tensor,
    ends_e: Tensor,
    order_R: Tensor | None = None,
    top_k: int = 1,
    *,
    format: str = "fp8",
    backend: str = "auto",
) -> Quantized:
    """Blocks down the rows of each expert, transposed, for a weight gradient: a GEMM that sums over rows.

    Args:
        x_TC: fp32, bf16 or fp16; rows in expert order, or tokens if there is an order.
        ends_e: int32, expert i owns rows ends[i-1] to ends[i] in expert order. Rows after the last are
            sentinels and left out.
        order_R: row i of expert order is token order[i] // top_k, as in `permute`.
        top_k: see order.
        format: as in `quantize_rows`.
        backend: as in `quantize_rows`.

    Returns:
        values_CP and scales_CB as in `quantize_rows`, of the rows padded with zeros so that each expert
        begins on a multiple of 128. P = (R // 128 + e) * 128 is enough for every routing.

    Raises:
        ValueError: as in `quantize_rows`, and if ends or order do not fit.
    """
    kind = format_named(format)
    _check("x", x_TC, 2)
    if ends_e.dim() != 1 or ends_e.dtype != torch.int32 or not ends_e.numel():
        raise ValueError(f"ends must be an int32 vector, got {ends_e.dtype} of shape {tuple(ends_e.shape)}")
    if order_R is not None and order_R.shape != (x_TC.shape[0] * top_k,):
        raise ValueError(f"order must hold {x_TC.shape[0] * top_k} rows, got {tuple(order_R.shape)}")
    if choose_backend(backend, x_TC) == "torch":
        return Quantized(*plain.quantize_columns_torch(x_TC.detach(), ends_e, order_R, top_k, kind))
    return Quantized(*triton_op.quantize_columns(x_TC.detach(), ends_e, order_R, top_k, format))


def _check(name: str, tensor: Tensor, num_dims: int) -> None:
    if tensor.dim() != num_dims or tensor.dtype not in DTYPES or 0 in tensor.shape[1:]:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"{name} must have {num_dims} dimensions, none after the first empty, and a dtype of {allowed}; "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
