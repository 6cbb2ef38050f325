"""Gather and weighted sum, one token at a time: the oracle. T tokens, K top-k, N = T*K, D model."""

from __future__ import annotations

import torch
from torch import Tensor


def combine_reference(y_ND: Tensor, weights_TK: Tensor, inverse_N: Tensor) -> Tensor:
    """Same contract as `combine`, in the dtype of y."""
    T, K = weights_TK.shape
    rows = [
        sum((weights_TK[t, k].to(y_ND.dtype) * y_ND[inverse_N[t * K + k]] for k in range(K)), torch.zeros(()))
        for t in range(T)
    ]
    return torch.stack(rows) if rows else y_ND.new_empty(0, y_ND.shape[1])
