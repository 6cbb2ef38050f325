"""Experts in plain torch, one at a time: an expert's rows stay in the cache from product to product.

Shapes: T tokens, K top-k, N = T*K routed pairs, D model, F expert hidden, G = 2F, e experts, R rows of an
expert.

Products are in x's dtype, what is between them in fp32 (fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels.expert_mlp.activation import activated, activation_backward, gated
from moe.kernels.expert_mlp.sums import Index, sum_of_experts
from moe.kernels.expert_mlp.variant import PLAIN, Variant
from moe.kernels.grouped_gemm.torch_backend import rows_of_experts


def expert_mlp_fwd(
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    w_down_eDF: Tensor,
    weights_TK: Tensor,
    index: Index,
    *,
    variant: Variant = PLAIN,
) -> tuple[Tensor, Tensor]:
    """y_TD and h_NG; contiguous inputs that `expert_mlp` has checked."""
    tokens_N, weights_N1 = _tokens_and_weights(weights_TK, index)
    h_NG = x_TD.new_empty(weights_TK.numel(), w_gate_up_eGD.shape[1])

    def forward(expert: int, rows: slice, out: Tensor | None) -> Tensor:
        tokens_R, weights_R1 = tokens_N[rows], weights_N1[rows]
        h_RG = torch.mm(x_TD.index_select(0, tokens_R), w_gate_up_eGD[expert].T, out=h_NG[rows])
        if variant.biases is not None:
            h_RG += variant.biases[0][expert]
        gate_RF, up_RF = h_RG.to(weights_TK.dtype).chunk(2, dim=1)
        # The weight scales A before the product instead of y after it: rows of A are shorter.
        a_RF = activated(gated(gate_RF, variant.activation), up_RF, variant.activation).mul_(weights_R1)
        y_RD = torch.mm(a_RF.to(x_TD.dtype), w_down_eDF[expert].T, out=out)
        if variant.biases is not None:
            y_RD += (weights_R1 * variant.biases[1][expert]).to(x_TD.dtype)
        return y_RD

    return sum_of_experts(forward, x_TD, weights_TK, index), h_NG


def expert_mlp_bwd(
    grad_TD: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    index: Index,
    h_NG: Tensor,
    *,
    variant: Variant = PLAIN,
) -> tuple[Tensor, ...]:
    """Gradients of the forward's first four arguments, `inputs`, then of the biases."""
    x_TD, w_gate_up_eGD, w_down_eDF, weights_TK = inputs
    tokens_N, weights_N1 = _tokens_and_weights(weights_TK, index)
    grad_gate_up_eGD, grad_down_eDF = (_zero_if_unused(w, index) for w in (w_gate_up_eGD, w_down_eDF))
    grad_biases = tuple(torch.zeros_like(bias) for bias in variant.biases or ())
    grad_weights_N = weights_TK.new_zeros(weights_TK.numel())  # those of sentinels stay zero

    def backward(expert: int, rows: slice, out: Tensor | None) -> Tensor:
        tokens_R, weights_R1 = tokens_N[rows], weights_N1[rows]
        grad_RD = grad_TD.index_select(0, tokens_R)
        # The gradient of A before the weight scales it: its product with A is the weight's gradient.
        grad_a_RF = torch.mm(grad_RD, w_down_eDF[expert]).to(weights_TK.dtype)
        gate_RF, up_RF = h_NG[rows].to(weights_TK.dtype).chunk(2, dim=1)
        value_RF = gated(gate_RF, variant.activation)
        a_RF = activated(value_RF, up_RF, variant.activation)
        torch.linalg.vecdot(grad_a_RF, a_RF, out=grad_weights_N[rows])
        torch.mm(grad_RD.T, a_RF.mul_(weights_R1).to(x_TD.dtype), out=grad_down_eDF[expert])
        grad_h_RG = torch.empty_like(h_NG[rows], dtype=weights_TK.dtype)
        grad_gate_RF, grad_up_RF = grad_h_RG.chunk(2, dim=1)
        activation_backward(
            gate_RF,
            up_RF,
            value_RF,
            grad_a_RF.mul_(weights_R1),
            activation=variant.activation,
            out=(grad_gate_RF, grad_up_RF),
        )
        grad_h_RG = grad_h_RG.to(x_TD.dtype)
        torch.mm(grad_h_RG.T, x_TD.index_select(0, tokens_R), out=grad_gate_up_eGD[expert])
        if variant.biases is not None:
            grad_weights_N[rows] += (grad_RD @ variant.biases[1][expert]).to(weights_TK.dtype)
            grad_biases[0][expert] = grad_h_RG.sum(dim=0)
            grad_biases[1][expert] = (grad_RD * weights_R1).sum(dim=0)
        return torch.mm(grad_h_RG, w_gate_up_eGD[expert], out=out)

    grad_x_TD = sum_of_experts(backward, x_TD, weights_TK, index)
    grad_weights_TK = grad_weights_N.index_select(0, index[1]).view_as(weights_TK)
    return grad_x_TD, grad_gate_up_eGD, grad_down_eDF, grad_weights_TK, *grad_biases


def _tokens_and_weights(weights_TK: Tensor, index: Index) -> tuple[Tensor, Tensor]:
    """Token and weight [N, 1] of each row of expert order."""
    order_N, _, _ = index
    return order_N // weights_TK.shape[1], weights_TK.view(-1, 1).index_select(0, order_N)


def _zero_if_unused(weight: Tensor, index: Index) -> Tensor:
    """Memory for a gradient, zero for experts without rows; the others are written later."""
    grad = torch.empty_like(weight)
    used = {expert for expert, _ in rows_of_experts(index[2])}
    for expert in set(range(len(weight))) - used:
        grad[expert] = 0
    return grad
