"""SwiGLU experts over rows in expert order, one expert at a time: the oracle.

Shapes: R rows, D model, F expert hidden, G = 2F gate and up, e experts held here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_mlp_reference(x_RD: Tensor, w_gate_up_eGD: Tensor, w_down_eDF: Tensor, ends_e: Tensor) -> Tensor:
    """Same contract as `expert_mlp`."""
    outputs, start = [], 0
    for expert, end in enumerate(ends_e.tolist()):
        x = x_RD[start:end]
        gate, up = (x @ w_gate_up_eGD[expert].T).chunk(2, dim=-1)
        outputs.append((gate * gate.sigmoid() * up) @ w_down_eDF[expert].T)
        start = end
    return torch.cat(outputs)
