"""Operands of grouped GEMMs in low precision, and the sums over rows of a weight gradient."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

# T, K, N, ends in expert order; two rows a token where rows are gathered.
CASES = {
    "one row": (1, 16, 16, [1]),
    "uneven": (150, 272, 144, [3, 133, 150]),
    "empty and sentinels": (70, 128, 300, [0, 5, 5, 60]),
    "one hot": (200, 100, 32, [0, 200, 200]),
    "nobody": (5, 40, 30, [0, 0]),
}


def example(case: str, device: str, top_k: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, K] with rows of different sizes, w [e, N, K], ends, and an order of its rows."""
    T, K, N, ends = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x_TK = torch.randn(T, K, generator=generator) * torch.logspace(-2, 2, T).unsqueeze(1)
    w_eNK = torch.randn(len(ends), N, K, generator=generator)
    order_R = torch.randperm(T * top_k, generator=generator)
    ends_e = torch.tensor(ends, dtype=torch.int32) * top_k
    tensors = (x_TK.bfloat16(), w_eNK.bfloat16(), ends_e, order_R)
    x, w, e, order = (tensor.to(device) for tensor in tensors)
    return x, w, e, order


def sums_of_rows(left_RM: Tensor, right_RN: Tensor, ends_e: Tensor) -> Tensor:
    """[e, M, N], one expert at a time."""
    rows = [slice(first, end) for first, end in pairwise([0, *ends_e.tolist()])]
    return torch.stack([left_RM[r].T @ right_RN[r] for r in rows])
