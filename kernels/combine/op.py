"""Into expert order and back, deterministic in both directions: the public functions, checks, and backend.

Shapes: T tokens, K top-k, N = T*K routed pairs (pair n belongs to token n // K), D model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels.backend import choose_backend
from moe.kernels.combine.torch_backend import combine_torch, permute_torch, unpermute_torch
from moe.kernels.combine.triton_op import combine_triton, permute_triton, unpermute_triton

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def permute(x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, top_k: int, *, backend: str = "auto") -> Tensor:
    """Rows of x in expert order, each token K times; a token's gradient is the sum over its K rows.

    Args:
        x_TD: one row a token.
        order_N: pair at each row of expert order, from `permute_index`.
        inverse_N: row of each pair, likewise; one is the inverse of the other.
        top_k: K.
        backend: `auto` (triton on CUDA, torch elsewhere), `triton` or `torch`.

    Returns:
        out_ND in x's dtype: out[i] = x[order[i] // K].

    Raises:
        ValueError: if the lengths do not fit, or the backend cannot run here or take x's dtype.
    """
    _check(order_N, inverse_N, x_TD.shape[0] * top_k)
    if choose_backend(backend, x_TD) == "torch":
        return permute_torch(x_TD, order_N, inverse_N, top_k)
    _check_triton("x", x_TD, TRITON_DTYPES)
    return permute_triton(x_TD, inverse_N, top_k)


def unpermute(
    y_ND: Tensor, order_N: Tensor, inverse_N: Tensor, top_k: int, *, backend: str = "auto"
) -> Tensor:
    """Sum of each token's K rows: the transpose of `permute`, and `combine` with all weights one.

    Args:
        y_ND: rows in expert order.
        order_N: pair at each row of expert order, from `permute_index`.
        inverse_N: row of each pair, likewise; one is the inverse of the other.
        top_k: K.
        backend: `auto` (triton on CUDA, torch elsewhere), `triton` or `torch`.

    Returns:
        out_TD in y's dtype, the sum taken in fp32 or wider.

    Raises:
        ValueError: if the lengths do not fit, or the backend cannot run here or take y's dtype.
    """
    _check(order_N, inverse_N, y_ND.shape[0])
    if y_ND.shape[0] % top_k:
        raise ValueError(f"{y_ND.shape[0]} rows are not top_k={top_k} rows for each of some tokens")
    if choose_backend(backend, y_ND) == "torch":
        return unpermute_torch(y_ND, order_N, inverse_N, top_k)
    _check_triton("y", y_ND, TRITON_DTYPES)
    return unpermute_triton(y_ND, inverse_N, top_k)


def combine(
    y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, inverse_N: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Sum of each token's K expert outputs, weighted.

    Args:
        y_ND: expert outputs in expert order.
        weights_TK: fp32; the sum is taken in fp32 and returned in y's dtype.
        order_N: pair at each row of expert order, from `permute_index`.
        inverse_N: row of each pair, likewise; one is the inverse of the other.
        backend: `auto` (triton on CUDA, torch elsewhere), `triton` or `torch`.

    Raises:
        ValueError: if the lengths do not fit, weights are coarser than fp32, or the backend cannot run here
            or take these dtypes.
    """
    T, K = weights_TK.shape
    _check(order_N, inverse_N, T * K)
    _check(order_N, inverse_N, y_ND.shape[0])
    if weights_TK.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weights must be fp32, as topk_route gives them, got {weights_TK.dtype}")
    if choose_backend(backend, y_ND) == "torch":
        return combine_torch(y_ND, weights_TK, order_N, inverse_N)
    _check_triton("y", y_ND, TRITON_DTYPES)
    _check_triton("weights", weights_TK, (torch.float32,))
    return combine_triton(y_ND, weights_TK, inverse_N)


def _check(order_N: Tensor, inverse_N: Tensor, num_rows: int) -> None:
    if order_N.shape != (num_rows,) or inverse_N.shape != (num_rows,):
        raise ValueError(
            f"order and inverse must hold {num_rows} rows, "
            f"got {tuple(order_N.shape)} and {tuple(inverse_N.shape)}"
        )


def _check_triton(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"backend='triton' takes {name} of {allowed}, got {tensor.dtype}; use backend='torch'"
        )
