"""Quantisation one block at a time: the oracle.

Shapes: R rows, C columns, B blocks, e experts held here, N and K a weight's sides, P padded rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe.kernels.quantize.formats import (
    FORMATS,
    INVERSE_LARGEST,
    ROW_TILE,
    SMALLEST_SCALE,
    VALUE_DTYPE,
    Format,
)


def quantize_block(block: Tensor, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Values and the one scale of a block of any shape: x is about value * scale.

    The largest number of a block becomes 448, or between 224 and 448 where the scale is a power of two. A
    block with NaN or infinity in it is NaN throughout, scale and values, so that nothing hides an overflow.
    """
    wide = block.float()
    scale = (wide.abs().max() * INVERSE_LARGEST).clamp(min=SMALLEST_SCALE)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones(()), exponent - (mantissa == 0.5).int())
    if not wide.isfinite().all():
        scale = torch.tensor(math.nan)
    return (wide * (1 / scale)).to(VALUE_DTYPE), scale


def quantize_rows_reference(x_RC: Tensor, format: str = "fp8") -> tuple[Tensor, Tensor]:
    """Same contract as `quantize_rows`."""
    kind = FORMATS[format]
    values_RC, scales_RB = _outputs(x_RC, kind)
    for r in range(x_RC.shape[0]):
        for b in range(scales_RB.shape[1]):
            columns = slice(b * kind.block, (b + 1) * kind.block)
            block, scale = quantize_block(x_RC[r, columns], power_of_two=kind.power_of_two)
            values_RC[r, columns], scales_RB[r, b] = block, scale
    return values_RC, scales_RB.to(kind.scale_dtype)


def quantize_weights_reference(
    w_eNK: Tensor, format: str = "fp8", *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Same contract as `quantize_weights`."""
    kind = FORMATS[format]
    e, N, K = w_eNK.shape
    values_eNK = torch.empty_like(w_eNK, dtype=VALUE_DTYPE)
    scales_eBB = torch.empty(e, math.ceil(N / kind.block), math.ceil(K / kind.block))
    for expert, n, k in torch.cartesian_prod(*(torch.arange(size) for size in scales_eBB.shape)).tolist():
        place = (expert, *(slice(i * kind.block, (i + 1) * kind.block) for i in (n, k)))
        block, scale = quantize_block(w_eNK[place], power_of_two=kind.power_of_two)
        values_eNK[place], scales_eBB[expert, n, k] = block, scale
    return (values_eNK.transpose(1, 2).contiguous() if transposed else values_eNK), scales_eBB


def quantize_columns_reference(x_RC: Tensor, ends_e: Tensor, format: str = "fp8") -> tuple[Tensor, Tensor]:
    """Same contract as `quantize_columns`, of rows that are in expert order."""
    start, padded = 0, []
    for end in ends_e.tolist():
        count = end - start
        missing = -count % ROW_TILE
        padded += [x_RC[start:end], x_RC.new_zeros(missing, x_RC.shape[1])]
        start = end
    padded_PC = torch.cat(padded)
    num_tiles = x_RC.shape[0] // ROW_TILE + ends_e.shape[0]
    unused = x_RC.new_zeros(num_tiles * ROW_TILE - padded_PC.shape[0], x_RC.shape[1])
    return quantize_rows_reference(torch.cat((padded_PC, unused)).T, format)


def _outputs(x_RC: Tensor, kind: Format) -> tuple[Tensor, Tensor]:
    R, C = x_RC.shape
    return torch.empty(R, C, dtype=VALUE_DTYPE), torch.empty(R, math.ceil(C / kind.block))
