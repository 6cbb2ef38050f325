"""The Triton backend as custom operators, for torch.compile to trace.

Shapes: T tokens, E experts, K top-k, B sequences, X = E + 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def topk_route_triton(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    *,
    choice: str,
    weighting: str,
    scale: float,
    num_groups: int,
    top_groups: int,
    sums_of: str | None,
    num_sequences: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same contract as `topk_route_torch`; at most 1024 experts and K = 16. Saves logits and ids only."""
    ids_TK, weights_TK, counts_BE, sums_BX = _forward(
        logits_TE,
        bias_E,
        top_k,
        choice,
        weighting,
        scale,
        num_groups,
        top_groups,
        sums_of,
        num_sequences,
    )
    return ids_TK, weights_TK, counts_BE, sums_BX


@torch.library.custom_op("joulemoe::topk_route", mutates_args=())
def _forward(  # noqa: PLR0917 - an operator's schema
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    choice: str,
    weighting: str,
    scale: float,
    num_groups: int,
    top_groups: int,
    sums_of: str | None,
    num_sequences: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Not at the top: triton is imported where its kernels run, and exists on Linux only.
    from moe.kernels.topk_route.triton_launch import topk_route_fwd

    return topk_route_fwd(
        logits_TE.contiguous(),
        bias_E,
        top_k,
        choice=choice,
        weighting=weighting,
        scale=scale,
        num_groups=num_groups,
        top_groups=top_groups,
        sums_of=sums_of,
        num_sequences=num_sequences,
    )


@_forward.register_fake
def _(  # noqa: PLR0917
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    choice: str,
    weighting: str,
    scale: float,
    num_groups: int,
    top_groups: int,
    sums_of: str | None,
    num_sequences: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, E = logits_TE.shape
    return (
        logits_TE.new_empty(T, top_k, dtype=torch.int64),
        logits_TE.new_empty(T, top_k, dtype=torch.float32),
        logits_TE.new_empty(num_sequences, E, dtype=torch.int64),
        logits_TE.new_empty(num_sequences if sums_of else 0, E + 1, dtype=torch.float32),
    )


@torch.library.custom_op("joulemoe::topk_route_backward", mutates_args=())
def _backward(  # noqa: PLR0917 - an operator's schema
    grad_weights_TK: Tensor,
    grad_sums_BX: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    weighting: str,
    sums_of: str | None,
    scale: float,
) -> Tensor:
    from moe.kernels.topk_route.triton_launch import topk_route_bwd

    return topk_route_bwd(
        grad_weights_TK.contiguous(),
        grad_sums_BX.contiguous(),
        logits_TE.contiguous(),
        ids_TK,
        weighting=weighting,
        sums_of=sums_of,
        scale=scale,
    )


@_backward.register_fake
def _(grad_weights_TK: Tensor, grad_sums_BX: Tensor, logits_TE: Tensor, *_: object) -> Tensor:
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_TE, _, _, _, ctx.weighting, ctx.scale, _, _, ctx.sums_of, _ = inputs
    ids_TK, _, counts_BE, _ = output
    ctx.mark_non_differentiable(ids_TK, counts_BE)
    ctx.save_for_backward(logits_TE, ids_TK)


def _gradient(
    ctx: Any, _ids: None, grad_weights_TK: Tensor, _counts: None, grad_sums_BX: Tensor
) -> tuple[Tensor | None, ...]:
    logits_TE, ids_TK = ctx.saved_tensors
    grad_TE = _backward(
        grad_weights_TK, grad_sums_BX, logits_TE, ids_TK, ctx.weighting, ctx.sums_of, ctx.scale
    )
    return grad_TE, *(None,) * 9


_forward.register_autograd(_gradient, setup_context=_setup_context)
