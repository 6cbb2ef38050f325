"""Into expert order and back, one row at a time: the oracle. T tokens, K top-k, N = T*K, D model."""

from __future__ import annotations

import torch
from torch import Tensor


def permute_reference(x_TD: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """Same contract as `permute`."""
    rows = [x_TD[n // top_k] for n in order_N.tolist()]
    return torch.stack(rows) if rows else x_TD.new_empty(0, x_TD.shape[1])


def combine_reference(y_ND: Tensor, weights_TK: Tensor, inverse_N: Tensor) -> Tensor:
    """Same contract as `combine`, in the dtype of y."""
    T, K = weights_TK.shape
    rows = [
        sum((weights_TK[t, k].to(y_ND.dtype) * y_ND[inverse_N[t * K + k]] for k in range(K)), torch.zeros(()))
        for t in range(T)
    ]
    return torch.stack(rows) if rows else y_ND.new_empty(0, y_ND.shape[1])
