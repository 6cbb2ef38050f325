"""Grouped GEMMs in plain torch, one product an expert. R rows, e experts; M, N, K as in triton_kernel.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def rows_of_experts(ends_e: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which."""
    start = 0
    for expert, end in enumerate(ends_e.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def grouped_gemm_torch(
    a: Tensor, w_eKN: Tensor, ends_e: Tensor, order_R: Tensor | None, top_k: int
) -> Tensor:
    """Product [R, N] = a[order // top_k] @ w of each row's expert; rows of no expert are not written."""
    num_rows = a.shape[0] if order_R is None else order_R.shape[0]
    out_RN = a.new_empty(num_rows, w_eKN.shape[2])
    for expert, rows in rows_of_experts(ends_e):
        torch.mm(_rows(a, rows, order_R, top_k), w_eKN[expert], out=out_RN[rows])
    return out_RN


def grouped_wgrad_torch(
    grad_RF: Tensor, x_TD: Tensor, ends_e: Tensor, order_R: Tensor | None, top_k: int
) -> Tensor:
    """Gradient [e, F, D]: for each expert the sum over its rows of grad^T x[order // top_k]."""
    out = x_TD.new_zeros(ends_e.numel(), grad_RF.shape[1], x_TD.shape[1])
    for expert, rows in rows_of_experts(ends_e):
        torch.mm(grad_RF[rows].T, _rows(x_TD, rows, order_R, top_k), out=out[expert])
    return out


def _rows(a: Tensor, rows: slice, order_R: Tensor | None, top_k: int) -> Tensor:
    return a[rows] if order_R is None else a.index_select(0, order_R[rows] // top_k)
