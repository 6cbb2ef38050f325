"""Experts over routed tokens, one expert at a time: the oracle.

Shapes: T tokens, K top-k, N = T*K routed pairs, D model, F expert hidden, G = 2F gate and up, e experts here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels.expert_mlp.activation import activated, gated


def expert_mlp_reference(
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    w_down_eDF: Tensor,
    weights_TK: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    *,
    activation: str = "swiglu",
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Same contract as `expert_mlp`; autograd differentiates it."""
    order_N, _, ends_e = index
    top_k = weights_TK.shape[1]
    y_TD = torch.zeros(
        x_TD.shape, dtype=torch.promote_types(x_TD.dtype, weights_TK.dtype), device=x_TD.device
    )
    start = 0
    for expert, end in enumerate(ends_e.tolist()):
        pairs = order_N[start:end]
        tokens = pairs // top_k
        h = x_TD[tokens] @ w_gate_up_eGD[expert].T
        if biases is not None:
            h = h + biases[0][expert]
        gate, up = h.chunk(2, dim=-1)
        y = activated(gated(gate, activation), up, activation) @ w_down_eDF[expert].T
        if biases is not None:
            y = y + biases[1][expert]
        y_TD = y_TD.index_add(0, tokens, weights_TK.flatten()[pairs].unsqueeze(1) * y)
        start = end
    return y_TD.to(x_TD.dtype)
