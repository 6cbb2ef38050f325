"""The Triton backend as custom operators, for torch.compile to trace.

Shapes: R rows, C columns, B blocks, e experts held here, N and K a weight's sides, P padded rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels.quantize.formats import FORMATS, ROW_TILE, VALUE_DTYPE


def quantize_rows(x_RC: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Contract of the public function, whose checks have passed."""
    values_RC, scales_RB = _rows(x_RC, format)
    return values_RC, scales_RB


def quantize_weights(w_eNK: Tensor, transposed: bool, format: str) -> tuple[Tensor, Tensor]:
    """Contract of the public function, whose checks have passed."""
    values, scales_eBB = _weights(w_eNK, transposed, format)
    return values, scales_eBB


def quantize_columns(
    x_TC: Tensor, ends_e: Tensor, order_R: Tensor | None, top_k: int, format: str
) -> tuple[Tensor, Tensor]:
    """Contract of the public function, whose checks have passed."""
    values_CP, scales_CB = _columns(x_TC, ends_e, order_R, top_k, format)
    return values_CP, scales_CB


@torch.library.custom_op("joulemoe::quantize_rows", mutates_args=())
def _rows(x_RC: Tensor, format: str) -> tuple[Tensor, Tensor]:
    # Not at the top: triton is imported where its kernels run, and exists on Linux only.
    from moe.kernels.quantize.triton_kernel import quantize_rows_triton

    return quantize_rows_triton(x_RC.contiguous(), FORMATS[format])


@_rows.register_fake
def _(x_RC: Tensor, format: str) -> tuple[Tensor, Tensor]:
    R, C = x_RC.shape
    return _like(x_RC, R, C, format)


@torch.library.custom_op("joulemoe::quantize_weights", mutates_args=())
def _weights(w_eNK: Tensor, transposed: bool, format: str) -> tuple[Tensor, Tensor]:
    from moe.kernels.quantize.triton_kernel import quantize_weights_triton

    return quantize_weights_triton(w_eNK.contiguous(), transposed, FORMATS[format])


@_weights.register_fake
def _(w_eNK: Tensor, transposed: bool, format: str) -> tuple[Tensor, Tensor]:
    e, N, K = w_eNK.shape
    blocks = (_ceil_div(size, FORMATS[format].block) for size in (N, K))
    values = w_eNK.new_empty(e, *((K, N) if transposed else (N, K)), dtype=VALUE_DTYPE)
    return values, w_eNK.new_empty(e, *blocks, dtype=torch.float32)


@torch.library.custom_op("joulemoe::quantize_columns", mutates_args=())
def _columns(
    x_TC: Tensor, ends_e: Tensor, order_R: Tensor | None, top_k: int, format: str
) -> tuple[Tensor, Tensor]:
    from moe.kernels.quantize.triton_kernel import quantize_columns_triton

    order_R = None if order_R is None else order_R.contiguous()
    return quantize_columns_triton(x_TC.contiguous(), ends_e.contiguous(), order_R, top_k, FORMATS[format])


@_columns.register_fake
def _(x_TC: Tensor, ends_e: Tensor, order_R: Tensor | None, top_k: int, format: str) -> tuple[Tensor, Tensor]:
    num_rows = x_TC.shape[0] if order_R is None else order_R.shape[0]
    num_tiles = num_rows // ROW_TILE + ends_e.shape[0]
    return _like(x_TC, x_TC.shape[1], num_tiles * ROW_TILE, format)


def _like(x: Tensor, num_rows: int, width: int, format: str) -> tuple[Tensor, Tensor]:
    """Values and scales of that many rows."""
    kind = FORMATS[format]
    values = x.new_empty(num_rows, width, dtype=VALUE_DTYPE)
    return values, x.new_empty(num_rows, _ceil_div(width, kind.block), dtype=kind.scale_dtype)


def _ceil_div(size: int, block: int) -> int:
    return (size + block - 1) // block
