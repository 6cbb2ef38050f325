"""The experts of fp8_kernel.py in plain torch: operands are rounded as there, products are in fp32.

Shapes: T tokens, K top-k, N = T*K routed pairs, D model, F expert hidden, G = 2F, e experts, R rows of an
expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.expert_mlp.saved_h import SavedH
from moe.kernels.grouped_gemm.torch_backend import rows_of_experts
from moe.kernels.quantize.formats import FORMATS, Format
from moe.kernels.quantize.torch_backend import (
    dequantize_rows,
    dequantize_weights,
    quantize_rows_torch,
    quantize_weights_torch,
)

Index = tuple[Tensor, Tensor, Tensor]


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
    """y_TD and h; inputs that `expert_mlp` has checked. Uncompressed, h has no scales."""
    order_N, _, ends_e = index
    kind, dtype = FORMATS[format], x_TD.dtype
    kind_of_h = None if wide_into_activation else kind
    x_by_rows_TD = _rows(x_TD, kind_of_h)
    # Rows of sentinels are zeros.
    wide_h_NG = x_by_rows_TD.new_zeros(weights_TK.numel(), w_gate_up_eGD.shape[1])
    y_TD = torch.zeros_like(x_by_rows_TD)
    for expert, rows in rows_of_experts(ends_e):
        pairs_R = order_N[rows]
        tokens_R = pairs_R // weights_TK.shape[1]
        wide_h_NG[rows] = x_by_rows_TD[tokens_R] @ _weight(w_gate_up_eGD[expert], 1, kind_of_h).T
        h = _saved(wide_h_NG[rows], dtype, kind if compress_h else None)
        # The activation is that of the rounded values, those that the backward will have.
        gate_RF, up_RF = _restored(h, kind).chunk(2, dim=-1)
        a_RF = _rows(F.silu(gate_RF) * up_RF, kind)
        y_RD = (a_RF @ _weight(w_down_eDF[expert], 1, kind).T).to(dtype)
        y_TD.index_add_(0, tokens_R, y_RD * weights_TK.view(-1, 1)[pairs_R])
    return y_TD.to(dtype), _saved(wide_h_NG, dtype, kind if compress_h else None)


def expert_mlp_bwd(
    grad_TD: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    index: Index,
    h: SavedH,
    *,
    format: str,
    wide_into_activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the forward's first four arguments, `inputs`."""
    x_TD, w_gate_up_eGD, w_down_eDF, weights_TK = inputs
    order_N, _, ends_e = index
    kind, dtype = FORMATS[format], x_TD.dtype
    kind_of_grad_a = None if wide_into_activation else kind
    h_NG = _restored(h, kind)
    grad_by_rows_TD = _rows(grad_TD, kind_of_grad_a)
    grad_x_TD = torch.zeros_like(grad_by_rows_TD)
    grad_gate_up_eGD, grad_down_eDF = torch.zeros_like(w_gate_up_eGD), torch.zeros_like(w_down_eDF)
    grad_weights_TK = torch.zeros_like(weights_TK)
    for expert, rows in rows_of_experts(ends_e):
        pairs_R = order_N[rows]
        tokens_R = pairs_R // weights_TK.shape[1]
        weights_R1 = weights_TK.view(-1, 1)[pairs_R]
        gate_RF, up_RF = h_NG[rows].chunk(2, dim=-1)
        sigmoid_RF = gate_RF.sigmoid()
        silu_RF = gate_RF * sigmoid_RF
        a_RF = silu_RF * up_RF
        grad_a_RF = grad_by_rows_TD[tokens_R] @ _weight(w_down_eDF[expert], 0, kind_of_grad_a)
        grad_weights_TK.view(-1)[pairs_R] = (grad_a_RF * a_RF).sum(dim=1)
        scaled_a_RF = _columns(a_RF * weights_R1, kind)
        grad_down_eDF[expert] = (_columns(grad_TD[tokens_R], kind).T @ scaled_a_RF).to(dtype)
        grad_a_RF *= weights_R1
        grad_gate_RF = grad_a_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF))
        grad_h_RG = torch.cat([grad_gate_RF, grad_a_RF * silu_RF], dim=1).to(dtype)
        x_RD = _columns(x_TD[tokens_R], kind)
        grad_gate_up_eGD[expert] = (_columns(grad_h_RG, kind).T @ x_RD).to(dtype)
        grad_x_RD = _rows(grad_h_RG, kind) @ _weight(w_gate_up_eGD[expert], 0, kind)
        grad_x_TD.index_add_(0, tokens_R, grad_x_RD.to(dtype).float())
    return grad_x_TD.to(dtype), grad_gate_up_eGD, grad_down_eDF, grad_weights_TK


def _saved(h_RG: Tensor, dtype: torch.dtype, kind: Format | None) -> SavedH:
    """H as the backward gets it: compressed if there is a format for it."""
    h_RG = h_RG.to(dtype)
    return SavedH(h_RG, None) if kind is None else SavedH(*quantize_rows_torch(h_RG, kind))


def _restored(h: SavedH, kind: Format) -> Tensor:
    """H in fp32."""
    return h.values.float() if h.scales is None else dequantize_rows(h.values, h.scales, kind)


def _rows(x_RC: Tensor, kind: Format | None) -> Tensor:
    """What a product that sums over columns sees of x, in fp32: x itself without a format."""
    if kind is None:
        return x_RC.float()
    return dequantize_rows(*quantize_rows_torch(x_RC, kind), kind)


def _columns(x_RC: Tensor, kind: Format | None) -> Tensor:
    """What a product that sums over these rows sees of x; the blocks of an expert begin with its rows."""
    return _rows(x_RC.T, kind).T


def _weight(w_NK: Tensor, sum_over: int, kind: Format | None) -> Tensor:
    """What a product that sums over dimension 0 or 1 of a weight sees of it."""
    if kind is None or kind is FORMATS["mxfp8"]:
        return _rows(w_NK, kind) if sum_over else _columns(w_NK, kind)
    return dequantize_weights(*quantize_weights_torch(w_NK.unsqueeze(0), False, kind), kind)[0]
