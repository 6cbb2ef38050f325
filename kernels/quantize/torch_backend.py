"""Quantisation in plain torch, all blocks at once, and the way back.

Shapes: R rows, C columns, B blocks, e experts held here, N and K a weight's sides, P padded rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.quantize.formats import INVERSE_LARGEST, ROW_TILE, SMALLEST_SCALE, VALUE_DTYPE, Format


def quantize_rows_torch(x_RC: Tensor, kind: Format) -> tuple[Tensor, Tensor]:
    """Contract of `quantize_rows`, whose checks have passed."""
    blocks_RBK = _in_blocks(x_RC, kind.block)
    scales_RB, inverse_RB = _scales(blocks_RBK.abs().amax(dim=2), kind)
    values_RC = (blocks_RBK * inverse_RB.unsqueeze(2)).flatten(1)[:, : x_RC.shape[1]]
    return values_RC.to(VALUE_DTYPE), scales_RB.to(kind.scale_dtype)


def quantize_weights_torch(w_eNK: Tensor, transposed: bool, kind: Format) -> tuple[Tensor, Tensor]:
    """Contract of `quantize_weights`, whose checks have passed."""
    _, N, K = w_eNK.shape
    padded_eNK = F.pad(w_eNK.float(), (0, -K % kind.block, 0, -N % kind.block))
    blocks_eBnBk = padded_eNK.unflatten(2, (-1, kind.block)).unflatten(1, (-1, kind.block))
    scales_eBB, inverse_eBB = _scales(blocks_eBnBk.abs().amax(dim=(2, 4)), kind)
    scaled_eNK = (blocks_eBnBk * inverse_eBB[:, :, None, :, None]).flatten(3).flatten(1, 2)
    values_eNK = scaled_eNK[:, :N, :K].to(VALUE_DTYPE)
    return (values_eNK.transpose(1, 2) if transposed else values_eNK).contiguous(), scales_eBB


def quantize_columns_torch(
    x_TC: Tensor, ends_e: Tensor, order_R: Tensor | None, top_k: int, kind: Format
) -> tuple[Tensor, Tensor]:
    """Contract of `quantize_columns`, whose checks have passed."""
    num_rows = x_TC.shape[0] if order_R is None else order_R.shape[0]
    rows_P, owned_P = padded_rows(ends_e, num_rows)
    source_P = rows_P if order_R is None else order_R[rows_P] // top_k
    padded_PC = x_TC[source_P] if num_rows else x_TC.new_zeros(rows_P.shape[0], x_TC.shape[1])
    padded_PC = padded_PC.where(owned_P.unsqueeze(1), 0.0)
    values_CP, scales_CB = quantize_rows_torch(padded_PC.T, kind)
    return values_CP.contiguous(), scales_CB.contiguous()


def dequantize_rows(values_RC: Tensor, scales_RB: Tensor, kind: Format) -> Tensor:
    """What values and scales stand for, in fp32."""
    wide_RB = scales_RB.float().repeat_interleave(kind.block, dim=1)
    return values_RC.float() * wide_RB[:, : values_RC.shape[1]]


def dequantize_weights(values_eNK: Tensor, scales_eBB: Tensor, kind: Format) -> Tensor:
    """What values and scales stand for, in fp32."""
    wide_eNK = scales_eBB.repeat_interleave(kind.block, dim=1).repeat_interleave(kind.block, dim=2)
    return values_eNK.float() * wide_eNK[:, : values_eNK.shape[1], : values_eNK.shape[2]]


def dequantize_columns(
    values_CP: Tensor, scales_CB: Tensor, ends_e: Tensor, num_rows: int, kind: Format
) -> Tensor:
    """What values and scales stand for, as rows in expert order in fp32; zeros where no expert owns a row."""
    rows_P, owned_P = padded_rows(ends_e, num_rows)
    x_CP = dequantize_rows(values_CP, scales_CB, kind)
    # What nobody owns goes to a row of its own, which is cut off.
    x_RC = x_CP.new_zeros(num_rows + 1, x_CP.shape[0])
    x_RC[rows_P.where(owned_P, num_rows)] = x_CP.T
    return x_RC[:num_rows]


def padded_rows(ends_e: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Row in expert order of each padded row, and whether there is one; an expert begins on a tile.

    The number of tiles, num_rows // ROW_TILE + e, is enough for every routing.
    """
    starts_e = F.pad(ends_e, (1, 0))[:-1]
    tiles_e = (ends_e - starts_e + ROW_TILE - 1) // ROW_TILE
    tile_ends_e = tiles_e.cumsum(0)
    num_experts = ends_e.shape[0]
    o_P = torch.arange((num_rows // ROW_TILE + num_experts) * ROW_TILE, device=ends_e.device)
    expert_P = torch.searchsorted(tile_ends_e, o_P // ROW_TILE, right=True)
    real_P = expert_P.clamp(max=num_experts - 1)
    rows_P = starts_e[real_P] + o_P - (tile_ends_e - tiles_e)[real_P] * ROW_TILE
    owned_P = (expert_P < num_experts) & (rows_P < ends_e[real_P])
    return rows_P.where(owned_P, 0), owned_P


def _in_blocks(x_RC: Tensor, block: int) -> Tensor:
    """[R, C] to [R, B, block] in fp32; the last block is filled up with zeros."""
    blocks_RBK: Tensor = F.pad(x_RC.float(), (0, -x_RC.shape[1] % block)).unflatten(1, (-1, block))
    return blocks_RBK


def _scales(largest: Tensor, kind: Format) -> tuple[Tensor, Tensor]:
    """Scales of blocks from their largest absolute values, and the factors that quantise."""
    scales = (largest * INVERSE_LARGEST).clamp(min=SMALLEST_SCALE)
    if kind.power_of_two:
        # A power of two has a mantissa of zeros; adding all ones first rounds up.
        scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    scales = scales.where(largest.isfinite(), torch.nan)
    return scales, scales.reciprocal()
