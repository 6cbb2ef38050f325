"""SwiGLU experts in plain torch, one expert at a time: its rows stay in the CPU's cache.

Shapes: T tokens, K top-k, N = T*K routed pairs, D model, F expert hidden, G = 2F, e experts, R rows of an
expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Index = tuple[Tensor, Tensor, Tensor]


def expert_mlp_fwd(
    x_TD: Tensor, w_gate_up_eGD: Tensor, w_down_eDF: Tensor, weights_TK: Tensor, index: Index
) -> tuple[Tensor, Tensor]:
    """y_TD and h_NG; contiguous inputs that `expert_mlp` has checked."""
    order_N, _, ends_e = index
    h_NG = x_TD.new_empty(weights_TK.numel(), w_gate_up_eGD.shape[1])
    # An expert has a token once, so a token's sum is in the order of experts, the same in every run.
    y_TD = torch.zeros_like(x_TD, dtype=weights_TK.dtype)
    for expert, rows in _experts(ends_e):
        pairs_R = order_N[rows]
        tokens_R = pairs_R // weights_TK.shape[1]
        h_RG = torch.mm(x_TD.index_select(0, tokens_R), w_gate_up_eGD[expert].T, out=h_NG[rows])
        gate_RF, up_RF = h_RG.to(weights_TK.dtype).chunk(2, dim=-1)
        y_RD = (F.silu(gate_RF) * up_RF).to(x_TD.dtype) @ w_down_eDF[expert].T
        y_TD.index_add_(0, tokens_R, y_RD * weights_TK.view(-1, 1).index_select(0, pairs_R))
    return y_TD.to(x_TD.dtype), h_NG


def expert_mlp_bwd(
    grad_TD: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor], index: Index, h_NG: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the forward's first four arguments, `inputs`."""
    x_TD, w_gate_up_eGD, w_down_eDF, weights_TK = inputs
    order_N, _, ends_e = index
    grad_x_TD = torch.zeros_like(x_TD, dtype=weights_TK.dtype)
    grad_gate_up_eGD, grad_down_eDF = torch.zeros_like(w_gate_up_eGD), torch.zeros_like(w_down_eDF)
    grad_weights_TK = torch.zeros_like(weights_TK)
    for expert, rows in _experts(ends_e):
        pairs_R = order_N[rows]
        tokens_R = pairs_R // weights_TK.shape[1]
        weights_R1 = weights_TK.view(-1, 1).index_select(0, pairs_R)
        grad_RD = grad_TD.index_select(0, tokens_R)
        gate_RF, up_RF = h_NG[rows].to(weights_TK.dtype).chunk(2, dim=-1)
        sigmoid_RF = gate_RF.sigmoid()
        silu_RF = gate_RF * sigmoid_RF
        a_RF = silu_RF * up_RF
        # The gradient of the activation before the weight scales it: its product with A is the weight's.
        grad_a_RF = (grad_RD @ w_down_eDF[expert]).to(weights_TK.dtype)
        grad_weights_TK.view(-1)[pairs_R] = (grad_a_RF * a_RF).sum(dim=1)
        torch.mm(grad_RD.T, (a_RF * weights_R1).to(x_TD.dtype), out=grad_down_eDF[expert])
        grad_a_RF *= weights_R1
        grad_gate_RF = grad_a_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF))
        grad_h_RG = torch.cat([grad_gate_RF, grad_a_RF * silu_RF], dim=1).to(x_TD.dtype)
        torch.mm(grad_h_RG.T, x_TD.index_select(0, tokens_R), out=grad_gate_up_eGD[expert])
        grad_x_TD.index_add_(0, tokens_R, (grad_h_RG @ w_gate_up_eGD[expert]).to(weights_TK.dtype))
    return grad_x_TD.to(x_TD.dtype), grad_gate_up_eGD, grad_down_eDF, grad_weights_TK


def _experts(ends_e: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which."""
    start = 0
    for expert, end in enumerate(ends_e.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end
