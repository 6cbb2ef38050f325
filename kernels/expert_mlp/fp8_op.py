"""The experts in low precision as custom operators. Shapes as in op.py, whose checks have passed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe.kernels.expert_mlp.saved_h import SavedH
from moe.kernels.quantize.formats import FORMATS, ROW_TILE, VALUE_DTYPE, format_named

ALIGNMENT = 16  # numbers of one byte that a kernel loads at once
# Major compute capability from which tensor cores know these numbers, and for mxfp8 their scales.
CAPABILITIES = {"fp8": 9, "fp8_power_of_two": 9, "mxfp8": 10}


def expert_mlp_low_precision(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    index: tuple[Tensor, Tensor, Tensor],
    precision: str,
    backend: str,
    *,
    compress_h: bool,
    wide_into_activation: bool,
) -> Tensor:
    """Contract of `expert_mlp`, whose first four arguments are the inputs.

    Args:
        inputs: x_TD, the weights of gate and up and of down, and the combine weights.
        index: as there.
        precision: a format of `quantize_rows`.
        backend: `triton` or `torch`.
        compress_h: as there.
        wide_into_activation: as there.

    Raises:
        ValueError: the backend has no such precision, or not for these sizes or this dtype.
    """
    x_TD, _, w_down_eDF, _ = inputs
    format_named(precision)
    if x_TD.dtype == torch.float64:
        raise ValueError(
            f"precision={precision!r} takes at most float32, got {x_TD.dtype}; use precision='wide'"
        )
    if backend == "triton":
        _check_triton(x_TD, precision)
    _, D, F = w_down_eDF.shape
    if F % ROW_TILE or D % ALIGNMENT:
        raise ValueError(
            f"precision={precision!r} needs an expert hidden size that is a multiple of {ROW_TILE} and a "
            f"model size that is one of {ALIGNMENT}, got {F} and {D}"
        )
    y_TD, *_ = _forward(*inputs, *index, precision, compress_h, wide_into_activation, backend)
    return y_TD  # type: ignore[no-any-return]


def _check_triton(x_TD: Tensor, precision: str) -> None:
    if x_TD.dtype != torch.bfloat16:
        raise ValueError(f"precision={precision!r} takes bfloat16 on triton, got {x_TD.dtype}")
    from moe.kernels.grouped_gemm.tiles import capability_of

    least, found = CAPABILITIES[precision], capability_of(x_TD)
    if x_TD.is_cuda and found < least:
        raise ValueError(
            f"precision={precision!r} needs a GPU of compute capability {least}, this one has {found}; use "
            "another precision, or backend='torch'"
        )


@torch.library.custom_op("joulemoe::expert_mlp_low_precision", mutates_args=())
def _forward(  # noqa: PLR0917 - an operator's schema
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    w_down_eDF: Tensor,
    weights_TK: Tensor,
    order_N: Tensor,
    inverse_N: Tensor,
    ends_e: Tensor,
    precision: str,
    compress_h: bool,
    wide_into_activation: bool,
    backend: str,
) -> list[Tensor]:
    """y_TD, and what the backward needs of H, `SavedH`; rows of sentinels mean nothing there."""
    y_TD, h = _implementation(backend).expert_mlp_fwd(
        *(tensor.contiguous() for tensor in (x_TD, w_gate_up_eGD, w_down_eDF, weights_TK)),
        (order_N.contiguous(), inverse_N.contiguous(), ends_e.contiguous()),
        format=precision,
        compress_h=compress_h,
        wide_into_activation=wide_into_activation,
    )
    return [y_TD, *(tensor for tensor in h if tensor is not None)]


@_forward.register_fake
def _(
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    _down: Tensor,
    weights_TK: Tensor,
    _order: Tensor,
    _inverse: Tensor,
    _ends: Tensor,
    precision: str,
    compress_h: bool,
    *_options: object,
) -> list[Tensor]:
    y_TD, (N, G) = x_TD.new_empty(x_TD.shape), (weights_TK.numel(), w_gate_up_eGD.shape[1])
    if not compress_h:
        return [y_TD, x_TD.new_empty(N, G)]
    kind = FORMATS[precision]
    scales = x_TD.new_empty(N, G // kind.block, dtype=kind.scale_dtype)
    return [y_TD, x_TD.new_empty(N, G, dtype=VALUE_DTYPE), scales]


@torch.library.custom_op("joulemoe::expert_mlp_low_precision_backward", mutates_args=())
def _backward(  # noqa: PLR0917 - an operator's schema
    grad_TD: Tensor,
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    w_down_eDF: Tensor,
    weights_TK: Tensor,
    order_N: Tensor,
    inverse_N: Tensor,
    ends_e: Tensor,
    h: list[Tensor],
    precision: str,
    wide_into_activation: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the two weights of the experts, and the combine weights."""
    return _implementation(backend).expert_mlp_bwd(  # type: ignore[no-any-return]
        grad_TD.contiguous(),
        tuple(tensor.contiguous() for tensor in (x_TD, w_gate_up_eGD, w_down_eDF, weights_TK)),
        (order_N.contiguous(), inverse_N.contiguous(), ends_e.contiguous()),
        SavedH(h[0], h[1] if len(h) == 2 else None),
        format=precision,
        wide_into_activation=wide_into_activation,
    )


@_backward.register_fake
def _(
    _: Tensor, x_TD: Tensor, w_gate_up_eGD: Tensor, w_down_eDF: Tensor, weights_TK: Tensor, *__: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, gate_up, down, weights = (t.new_empty(t.shape) for t in (x_TD, w_gate_up_eGD, w_down_eDF, weights_TK))
    return x, gate_up, down, weights


def _implementation(backend: str) -> ModuleType:
    # Not at the top: triton is imported where its kernels run, and exists on Linux only.
    if backend == "torch":
        from moe.kernels.expert_mlp import fp8_torch

        return fp8_torch
    from moe.kernels.expert_mlp import fp8_triton

    return fp8_triton


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, precision, _, wide_into_activation, backend = inputs
    ctx.options = precision, wide_into_activation, backend
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # h has no gradient: no zeros of its size
    ctx.save_for_backward(*tensors, *output[1:])


def _gradient(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    grad_TD = grads[0]
    if grad_TD is None:
        return (None,) * 11
    saved = ctx.saved_tensors  # once: under checkpointing each look unpacks
    gradients = _backward(grad_TD, *saved[:7], list(saved[7:]), *ctx.options)
    return *gradients, *(None,) * 7


_forward.register_autograd(_gradient, setup_context=_setup_context)
