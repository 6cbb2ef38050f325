"""Experts over routed tokens: the public function and the custom operators.

Shapes: T tokens, K top-k, N = T*K routed pairs (pair n is token n // K's), D model, F expert hidden, G = 2F
gate and up, e experts held here.

For the backward only x, the pre-activation h_NG, the weights and the index are saved (SonicMoE, arXiv
2512.14080): 2TD + 4NF bytes in bf16 beside N weights and indices. Tokens in expert order, the activation and
the experts' outputs are recomputed or not needed: with dA = W_down^T dY, the gradient of a pair's weight is
<dA, A>.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe.kernels.backend import choose_backend
from moe.kernels.expert_mlp.checks import (
    check_dtypes,
    check_index,
    check_low_precision,
    check_main_grads,
    check_shapes,
    check_variant,
)
from moe.kernels.expert_mlp.fp8_op import expert_mlp_low_precision
from moe.kernels.expert_mlp.variant import Variant
from moe.kernels.quantize.formats import FORMATS

PRECISIONS = ("wide", *FORMATS)


def expert_mlp(
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    w_down_eDF: Tensor,
    weights_TK: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    *,
    activation: str = "swiglu",
    biases: tuple[Tensor, Tensor] | None = None,
    precision: str = "wide",
    compress_h: bool = False,
    wide_into_activation: bool = False,
    main_grads: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """y[t] = sum over k of weights[t, k] * down(act(gate(x[t]), up(x[t]))) with the expert of pair (t, k).

    Args:
        x_TD: one row a token.
        w_gate_up_eGD: gate rows first, then up rows.
        w_down_eDF: down projection.
        weights_TK: fp32 combine weights.
        index: what `permute_index` returned for the pairs' expert ids: order_N, inverse_N, ends_e. Pairs of
            sentinel ids contribute nothing, and their weights get zero gradients; so do experts without
            pairs.
        activation: `swiglu`, `geglu` or `clamped_swiglu`; activation.py has their equations.
        biases: of gate and up [e, 2F] and of the down projection [e, D], or None.
        precision: of the operands of the products, forward and backward. `wide` takes them as they are; a
            format of `quantize_rows` quantises them along what each product sums over.
        compress_h: save h in that format too, in half the memory; the activation is then that of the
            rounded h, forward and backward.
        wide_into_activation: take the operands of two of the six products as they are: those of h, and of the
            gradient of the activation's output, whose errors the activation and its backward would double.
            For a precision that quantises, and without compress_h, which would round h after all.
        main_grads: fp32 tensors of the shapes of the experts' two weights. The backward adds the weights'
            gradients to them, and what autograd gets for the weights is memory without meaning (as under
            gradient_accumulation_fusion of Megatron-Core). Every backward through y adds, whichever inputs'
            gradients were asked for. For precision `wide`, and not for torch.compile.
        backend: `auto` (triton on CUDA, torch elsewhere), `triton` or `torch`.

    Returns:
        y_TD in x's dtype; sums are in fp32 or wider.

    Raises:
        ValueError: for shapes or dtypes that do not fit together or the precision, options that need another
            one, main_grads of weights that take no gradient or under torch.compile, or a backend that cannot
            run here.
    """
    order_N, inverse_N, ends_e = index
    chosen = choose_backend(backend, x_TD)
    check_shapes(x_TD, w_gate_up_eGD, w_down_eDF, weights_TK)
    check_index(order_N, inverse_N, ends_e, (weights_TK.numel(), w_down_eDF.shape[0]))
    check_dtypes(x_TD, w_gate_up_eGD, w_down_eDF, weights_TK, chosen)
    check_variant(Variant(activation, biases), w_gate_up_eGD, w_down_eDF, precision)
    check_main_grads(main_grads, w_gate_up_eGD, w_down_eDF, precision)
    check_low_precision(precision, compress_h=compress_h, wide_into_activation=wide_into_activation)
    inputs = (x_TD, w_gate_up_eGD, w_down_eDF, weights_TK)
    if precision != "wide":
        return expert_mlp_low_precision(
            inputs, index, precision, chosen, compress_h=compress_h, wide_into_activation=wide_into_activation
        )
    absent = (None, None)
    y_TD, _ = _forward(*inputs, *index, *(biases or absent), activation, chosen, *(main_grads or absent))
    return y_TD  # type: ignore[no-any-return]


@torch.library.custom_op("joulemoe::expert_mlp", mutates_args=())
def _forward(  # noqa: PLR0917 - an operator's schema
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    w_down_eDF: Tensor,
    weights_TK: Tensor,
    order_N: Tensor,
    inverse_N: Tensor,
    ends_e: Tensor,
    b_gate_up_eG: Tensor | None,
    b_down_eD: Tensor | None,
    activation: str,
    backend: str,
    _main_gate_up: Tensor | None = None,
    _main_down: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_TD, and h_NG: gate and up of each row of expert order; rows of sentinels are left as they are."""
    index = order_N.contiguous(), inverse_N.contiguous(), ends_e.contiguous()
    return _implementation(backend).expert_mlp_fwd(  # type: ignore[no-any-return]
        x_TD.contiguous(),
        w_gate_up_eGD.contiguous(),
        w_down_eDF.contiguous(),
        weights_TK.contiguous(),
        index,
        variant=_variant(activation, b_gate_up_eG, b_down_eD),
    )


@_forward.register_fake
def _(
    x_TD: Tensor, w_gate_up_eGD: Tensor, _: Tensor, weights_TK: Tensor, *__: object
) -> tuple[Tensor, Tensor]:
    h_NG = x_TD.new_empty(weights_TK.numel(), w_gate_up_eGD.shape[1])
    return x_TD.new_empty(x_TD.shape), h_NG


@torch.library.custom_op("joulemoe::expert_mlp_backward", mutates_args=())
def _backward(  # noqa: PLR0917 - an operator's schema
    grad_TD: Tensor,
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    w_down_eDF: Tensor,
    weights_TK: Tensor,
    order_N: Tensor,
    inverse_N: Tensor,
    ends_e: Tensor,
    b_gate_up_eG: Tensor | None,
    b_down_eD: Tensor | None,
    h_NG: Tensor,
    activation: str,
    backend: str,
) -> list[Tensor]:
    """Gradients of x, the two weights of the experts, the combine weights, and the biases, if any."""
    inputs = tuple(t.contiguous() for t in (x_TD, w_gate_up_eGD, w_down_eDF, weights_TK))
    index = order_N.contiguous(), inverse_N.contiguous(), ends_e.contiguous()
    variant = _variant(activation, b_gate_up_eG, b_down_eD)
    return list(
        _implementation(backend).expert_mlp_bwd(grad_TD.contiguous(), inputs, index, h_NG, variant=variant)
    )


@_backward.register_fake
def _(  # noqa: PLR0917 - an operator's schema
    _grad: Tensor,
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    w_down_eDF: Tensor,
    weights_TK: Tensor,
    _order: Tensor,
    _inverse: Tensor,
    _ends: Tensor,
    b_gate_up_eG: Tensor | None,
    b_down_eD: Tensor | None,
    *_: object,
) -> list[Tensor]:
    inputs = (x_TD, w_gate_up_eGD, w_down_eDF, weights_TK, b_gate_up_eG, b_down_eD)
    return [t.new_empty(t.shape) for t in inputs if t is not None]


@torch.library.custom_op(
    "joulemoe::expert_mlp_backward_into", mutates_args=("main_gate_up_eGD", "main_down_eDF")
)
def _backward_into(  # noqa: PLR0917 - an operator's schema
    grad_TD: Tensor,
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    w_down_eDF: Tensor,
    weights_TK: Tensor,
    order_N: Tensor,
    inverse_N: Tensor,
    ends_e: Tensor,
    b_gate_up_eG: Tensor | None,
    b_down_eD: Tensor | None,
    h_NG: Tensor,
    activation: str,
    backend: str,
    main_gate_up_eGD: Tensor,
    main_down_eDF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_backward`, but the gradients of the experts' weights are added to the last two arguments.

    Without biases their gradients are empty: torch.compile wants a fixed number of results beside mutations.
    """
    inputs = tuple(t.contiguous() for t in (x_TD, w_gate_up_eGD, w_down_eDF, weights_TK))
    index = order_N.contiguous(), inverse_N.contiguous(), ends_e.contiguous()
    variant = _variant(activation, b_gate_up_eG, b_down_eD)
    main_grads = main_gate_up_eGD, main_down_eDF
    grad_TD, bwd = grad_TD.contiguous(), _implementation(backend).expert_mlp_bwd
    if backend == "triton":
        grads = bwd(grad_TD, inputs, index, h_NG, variant=variant, main_grads=main_grads)
    else:
        grads = bwd(grad_TD, inputs, index, h_NG, variant=variant)
        for main, grad in zip(main_grads, grads[1:3], strict=True):
            main.add_(grad)
    biases = grads[4:] or (x_TD.new_empty(0), x_TD.new_empty(0))
    return grads[0], grads[3], *biases


@_backward_into.register_fake
def _(
    _grad: Tensor,
    x_TD: Tensor,
    _gate_up: Tensor,
    _down: Tensor,
    weights_TK: Tensor,
    _order: Tensor,
    _inverse: Tensor,
    _ends: Tensor,
    b_gate_up_eG: Tensor | None,
    b_down_eD: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b_gate_up, b_down = (x_TD.new_empty(0 if b is None else b.shape) for b in (b_gate_up_eG, b_down_eD))
    return x_TD.new_empty(x_TD.shape), weights_TK.new_empty(weights_TK.shape), b_gate_up, b_down


def _variant(activation: str, b_gate_up_eG: Tensor | None, b_down_eD: Tensor | None) -> Variant:
    if b_gate_up_eG is None or b_down_eD is None:
        return Variant(activation)
    return Variant(activation, (b_gate_up_eG.contiguous(), b_down_eD.contiguous()))


def _implementation(backend: str) -> ModuleType:
    # Not at the top: triton is imported where its kernels run, and exists on Linux only.
    if backend == "triton":
        from moe.kernels.expert_mlp import triton_kernel

        return triton_kernel
    from moe.kernels.expert_mlp import torch_backend

    return torch_backend


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.backend, main_gate_up_eGD, main_down_eDF = inputs
    # Not saved, which would forbid that another backward adds to them first; torch.compile would save them.
    ctx.main_grads = main_gate_up_eGD, main_down_eDF
    _, h_NG = output
    ctx.mark_non_differentiable(h_NG)
    ctx.set_materialize_grads(False)  # h has no gradient: no zeros of its size
    ctx.save_for_backward(*tensors, h_NG)


def _gradient(ctx: Any, grad_TD: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_TD is None:
        return (None,) * 13
    saved = ctx.saved_tensors  # once: under checkpointing each look unpacks
    arguments = (grad_TD, *saved, ctx.activation, ctx.backend)
    if ctx.main_grads[0] is None:
        grads = _backward(*arguments)
    else:
        grad_x_TD, *others = _backward_into(*arguments, *ctx.main_grads)
        # Anomaly detection looks for NaN in them.
        unused = torch.zeros_like if torch.is_anomaly_enabled() else torch.empty_like
        grads = [grad_x_TD, *(unused(weight) for weight in saved[1:3]), *others]
    has_biases = saved[7] is not None
    biases = grads[4:] if has_biases else (None, None)
    return *grads[:4], None, None, None, *biases, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)
