"""SwiGLU experts in low precision: the launches, of the kernels in fp8_kernel.py or in mx_kernel.py.

Shapes: T tokens, K top-k, N = T*K rows in expert order, D model, F expert hidden (a multiple of 128), G = 2F,
e experts.

The order is that of triton_kernel.py, each product one of two quantised operands, in blocks along its sum; H
and dA = dO W2 may be products of wide ones, in the same kernels:

Forward                               Backward
1. up     x rows, W1                  1. dH      dO rows, W2^T
          -> H in bf16 or rows, A rows           -> dH rows, dH columns, A' columns, dS
2. gemm   A rows, W2                  2. wgrad   dO columns, A' columns
                                      3. wgrad   dH columns, x columns
                                      4. gemm    dH rows, W1^T
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe.kernels.combine.triton_kernel import sum_rows
from moe.kernels.expert_mlp import fp8_kernel, mx_kernel
from moe.kernels.expert_mlp.saved_h import SavedH
from moe.kernels.expert_mlp.triton_kernel import Index, sum_partials
from moe.kernels.grouped_gemm.fp8_kernel import (
    Weight,
    fp8_weight,
    launch_fp8_gemm,
    launch_fp8_wgrad,
    wide_weight,
)
from moe.kernels.grouped_gemm.mx_kernel import launch_mx_gemm, launch_mx_wgrad, mx_weight
from moe.kernels.grouped_gemm.triton_kernel import TileMaps
from moe.kernels.quantize import quantize_columns, quantize_rows
from moe.kernels.quantize.formats import FORMATS, ROW_TILE, VALUE_DTYPE, Format, Quantized
from moe.kernels.quantize.triton_kernel import storage

Rows = tuple[Tensor, Tensor | None]  # quantised, or wide without scales


@dataclass(frozen=True)
class Steps:
    """What the formats differ in.

    Attributes:
        kind: the format.
        up: the kernel of H and A.
        grad_h: that of dH.
        options: constexprs of both.
        up_tile: how `up` is compiled.
        wide_up_tile: the same, of wide operands.
        up_columns: of A in a tile of either.
        grad_h_tile: how `grad_h` is compiled.
        rows: quantises rows.
        weight: quantises a weight.
        gemm: multiplies rows with one.
        wgrad: multiplies columns.
    """

    kind: Format
    up: Any
    grad_h: Any
    options: Mapping[str, bool]
    up_tile: Mapping[str, int]
    wide_up_tile: Mapping[str, int]
    up_columns: int
    grad_h_tile: Mapping[str, int]
    rows: Callable[[Tensor], Quantized]
    weight: Callable[..., Weight]
    gemm: Callable[..., Tensor]
    wgrad: Callable[..., Tensor]


def steps_of(format: str) -> Steps:
    """The steps of a format."""
    rows = partial(quantize_rows, format=format, backend="triton")
    if format == "mxfp8":
        return Steps(
            FORMATS[format],
            mx_kernel.mx_up_kernel,
            mx_kernel.mx_grad_h_kernel,
            options={},
            up_tile=mx_kernel.UP_TILE,
            wide_up_tile=mx_kernel.UP_TILE,
            up_columns=mx_kernel.UP_TILE["BLOCK_N"] // 2,
            grad_h_tile=mx_kernel.GRAD_H_TILE,
            rows=rows,
            weight=mx_weight,
            gemm=launch_mx_gemm,
            wgrad=launch_mx_wgrad,
        )
    return Steps(
        FORMATS[format],
        fp8_kernel.fp8_up_kernel,
        fp8_kernel.fp8_grad_h_kernel,
        options={"POWER_OF_TWO": FORMATS[format].power_of_two},
        up_tile=fp8_kernel.UP_TILE,
        wide_up_tile=fp8_kernel.WIDE_UP_TILE,
        up_columns=ROW_TILE,
        grad_h_tile=fp8_kernel.GRAD_H_TILE,
        rows=rows,
        weight=partial(fp8_weight, format=format),
        gemm=launch_fp8_gemm,
        wgrad=launch_fp8_wgrad,
    )


def expert_mlp_fwd(
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    w_down_eDF: Tensor,
    weights_TK: Tensor,
    index: Index,
    *,
    format: str,
    compress_h: bool,
    wide_into_activation: bool,
) -> tuple[Tensor, SavedH]:
    """y_TD and h; contiguous inputs in bf16 that `expert_mlp` has checked. Uncompressed, h has no scales."""
    order_N, inverse_N, ends_e = index
    steps, top_k = steps_of(format), weights_TK.shape[1]
    maps = TileMaps(ends_e, order_N.numel())
    x, w_gate_up = _operands(x_TD, w_gate_up_eGD, steps, wide=wide_into_activation)
    if compress_h:
        h = SavedH(*_new_quantized(x_TD, maps.num_rows, w_gate_up.columns, FORMATS[format]))
    else:
        h = SavedH(x_TD.new_empty(maps.num_rows, w_gate_up.columns), None)
    a = _launch_up(x, w_gate_up, h, (order_N, top_k), maps, steps=steps)
    y_ND = steps.gemm(a, steps.weight(w_down_eDF), maps, out_dtype=x_TD.dtype)
    return sum_rows(y_ND, weights_TK, inverse_N, top_k, ends_e=ends_e), h


def expert_mlp_bwd(
    grad_TD: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    index: Index,
    h: SavedH,
    *,
    format: str,
    wide_into_activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the forward's first four arguments, `inputs`; all contiguous."""
    x_TD, w_gate_up_eGD, w_down_eDF, weights_TK = inputs
    order_N, inverse_N, ends_e = index
    steps, dtype, top_k = steps_of(format), x_TD.dtype, weights_TK.shape[1]
    maps = TileMaps(ends_e, order_N.numel())
    in_order = partial(quantize_columns, order_R=order_N, top_k=top_k, format=format, backend="triton")
    grad, w_down = _operands(grad_TD, w_down_eDF, steps, wide=wide_into_activation, transposed=True)
    rows, columns, a_columns, partials_NP = _launch_grad_h(
        grad, w_down, (weights_TK, h), order_N, maps, steps=steps
    )
    grad_weights_TK = sum_partials(partials_NP, inverse_N, ends_e).view_as(weights_TK)
    grad_columns = in_order(grad_TD, ends_e)
    grad_down_eDF = steps.wgrad(grad_columns, a_columns, ends_e, out_dtype=dtype)
    del grad_columns, a_columns, partials_NP  # before the next large one
    x_columns = in_order(x_TD, ends_e)
    grad_gate_up_eGD = steps.wgrad(columns, x_columns, ends_e, out_dtype=dtype)
    del columns, x_columns
    w_gate_up = steps.weight(w_gate_up_eGD, transposed=True)
    grad_x_ND = steps.gemm(rows, w_gate_up, maps, out_dtype=dtype)
    grad_x_TD = sum_rows(grad_x_ND, None, inverse_N, top_k, ends_e=ends_e)
    return grad_x_TD, grad_gate_up_eGD, grad_down_eDF, grad_weights_TK


def _operands(
    x_TC: Tensor, w_eNK: Tensor, steps: Steps, *, wide: bool, transposed: bool = False
) -> tuple[Rows, Weight]:
    """Of a product that goes into the activation or its backward."""
    if wide:
        return (x_TC, None), wide_weight(w_eNK, transposed=transposed)
    return steps.rows(x_TC), steps.weight(w_eNK, transposed=transposed)


def _launch_up(
    x: Rows, w: Weight, h: SavedH, order: tuple[Tensor, int], maps: TileMaps, *, steps: Steps
) -> Quantized:
    """Fill h and make A by rows; `order` is order_N and top_k."""
    (order_N, top_k), (D, F) = order, (x[0].shape[1], w.columns // 2)
    a = _new_quantized(h.values, maps.num_rows, F, steps.kind)
    if maps.num_rows:
        tile = steps.wide_up_tile if w.scales is None else steps.up_tile
        map_P2 = maps.of(tile["BLOCK_M"])
        grid = (map_P2.shape[0] * (F // steps.up_columns),)
        tensors = (*_stored(x), w.values, w.scales, *_stored(h), *_stored(a), order_N, maps.ends_e, map_P2)
        sizes = {"TOP_K": top_k, "D": D, "F": F, "W_STRIDES": w.strides}
        with torch.cuda.device_of(order_N):
            steps.up[grid](*tensors, **sizes, **steps.options, **tile)
    return a


def _launch_grad_h(
    grad: Rows,
    w: Weight,
    saved: tuple[Tensor, SavedH],
    order_N: Tensor,
    maps: TileMaps,
    *,
    steps: Steps,
) -> tuple[Quantized, Quantized, Quantized, Tensor]:
    """Gradient dH by rows and columns, A' by columns, and dS in parts [N, F / 128]; `saved` are s and h."""
    (weights_TK, h), F = saved, w.columns
    num_tiles = maps.num_rows // ROW_TILE + maps.ends_e.numel()
    rows = _new_quantized(h.values, maps.num_rows, 2 * F, steps.kind)
    columns = _new_quantized(h.values, 2 * F, num_tiles * ROW_TILE, steps.kind)
    a_columns = _new_quantized(h.values, F, num_tiles * ROW_TILE, steps.kind)
    partials_NP = weights_TK.new_empty(maps.num_rows, F // ROW_TILE)
    if maps.num_rows:
        map_P2 = maps.of(ROW_TILE)
        grid = (map_P2.shape[0] * partials_NP.shape[1],)
        inputs = (*_stored(grad), w.values, w.scales, *_stored(h), weights_TK)
        outputs = (*_stored(rows), *_stored(columns), *_stored(a_columns), partials_NP)
        tensors = (*inputs, *outputs, order_N, maps.ends_e, map_P2, num_tiles)
        sizes = {"TOP_K": weights_TK.shape[1], "D": grad[0].shape[1], "F": F, "W_STRIDES": w.strides}
        with torch.cuda.device_of(order_N):
            steps.grad_h[grid](*tensors, **sizes, **steps.options, **steps.grad_h_tile)
    return rows, columns, a_columns, partials_NP


def _stored(rows: Rows) -> Rows:
    """Values and scales as a kernel takes them."""
    values, scales = rows
    return values, None if scales is None else storage(scales)


def _new_quantized(like: Tensor, num_rows: int, width: int, kind: Format) -> Quantized:
    """Room for rows in blocks along them."""
    values = like.new_empty(num_rows, width, dtype=VALUE_DTYPE)
    return Quantized(values, like.new_empty(num_rows, width // kind.block, dtype=kind.scale_dtype))
