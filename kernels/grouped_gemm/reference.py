"""Each expert's rows times its own weight, one expert at a time: the oracle.

Shapes: T tokens, R rows in expert order, D and F columns, e experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_gemm_reference(
    x_TD: Tensor,
    w_eFD: Tensor,
    ends_e: Tensor,
    *,
    gather: tuple[Tensor, Tensor] | None = None,
    top_k: int = 1,
) -> Tensor:
    """Same contract as `grouped_gemm`, with zeros in the rows of no expert; autograd differentiates it."""
    x_RD = x_TD if gather is None else x_TD[gather[0] // top_k]
    products, start = [], 0
    for expert, end in enumerate(ends_e.tolist()):
        products.append(x_RD[start:end] @ w_eFD[expert].T)
        start = end
    return torch.cat([*products, x_RD.new_zeros(len(x_RD) - start, w_eFD.shape[1])])
