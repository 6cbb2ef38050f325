"""SwiGLU experts (arXiv 2002.05202) over routed tokens: the public function, checks, custom operators.

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

DTYPES = {
    "torch": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def expert_mlp(
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    w_down_eDF: Tensor,
    weights_TK: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    *,
    backend: str = "auto",
) -> Tensor:
    """y[t] = sum over k of weights[t, k] * down(silu(gate(x[t])) * up(x[t])) with the expert of pair (t, k).

    Args:
        x_TD: one row a token.
        w_gate_up_eGD: gate rows first, then up rows.
        w_down_eDF: down projection.
        weights_TK: fp32 combine weights.
        index: what `permute_index` returned for the pairs' expert ids: order_N, inverse_N, ends_e. Pairs of
            sentinel ids contribute nothing, and their weights get zero gradients; so do experts without
            pairs.
        backend: `auto` (triton on CUDA, torch elsewhere), `triton` or `torch`.

    Returns:
        y_TD in x's dtype; sums are in fp32 or wider.

    Raises:
        ValueError: for shapes or dtypes that do not fit together, or a backend that cannot run here.
    """
    order_N, inverse_N, ends_e = index
    chosen = choose_backend(backend, x_TD)
    _check_shapes(x_TD, w_gate_up_eGD, w_down_eDF, weights_TK)
    _check_index(order_N, inverse_N, ends_e, (weights_TK.numel(), w_down_eDF.shape[0]))
    _check_dtypes(x_TD, w_gate_up_eGD, w_down_eDF, weights_TK, chosen)
    y_TD, _ = _forward(x_TD, w_gate_up_eGD, w_down_eDF, weights_TK, order_N, inverse_N, ends_e, chosen)
    return y_TD  # type: ignore[no-any-return]


def _check_shapes(x_TD: Tensor, w_gate_up_eGD: Tensor, w_down_eDF: Tensor, weights_TK: Tensor) -> None:
    if x_TD.dim() != 2 or w_gate_up_eGD.dim() != 3 or w_down_eDF.dim() != 3 or weights_TK.dim() != 2:
        shapes = [tuple(t.shape) for t in (x_TD, w_gate_up_eGD, w_down_eDF, weights_TK)]
        raise ValueError(
            f"expected x [T, D], gate_up [e, 2F, D], down [e, D, F] and weights [T, K], got {shapes}"
        )
    e, G, D = w_gate_up_eGD.shape
    if w_down_eDF.shape != (e, D, G // 2) or G % 2 or x_TD.shape[1] != D:
        raise ValueError(
            f"gate_up {tuple(w_gate_up_eGD.shape)} needs down [{e}, {D}, {G // 2}] and x [T, {D}], "
            f"got down {tuple(w_down_eDF.shape)} and x {tuple(x_TD.shape)}"
        )
    if weights_TK.shape[0] != x_TD.shape[0]:
        raise ValueError(
            f"weights {tuple(weights_TK.shape)} must have a row for each of the {x_TD.shape[0]} tokens"
        )


def _check_index(order_N: Tensor, inverse_N: Tensor, ends_e: Tensor, sizes: tuple[int, int]) -> None:
    num_pairs, num_experts = sizes
    if order_N.shape != (num_pairs,) or inverse_N.shape != (num_pairs,):
        raise ValueError(
            f"order and inverse must hold {num_pairs} pairs, "
            f"got {tuple(order_N.shape)} and {tuple(inverse_N.shape)}"
        )
    if ends_e.shape != (num_experts,) or ends_e.dtype != torch.int32:
        raise ValueError(
            f"ends must be int32 of shape [{num_experts}], got {ends_e.dtype} {tuple(ends_e.shape)}"
        )


def _check_dtypes(
    x_TD: Tensor, w_gate_up_eGD: Tensor, w_down_eDF: Tensor, weights_TK: Tensor, backend: str
) -> None:
    if not x_TD.dtype == w_gate_up_eGD.dtype == w_down_eDF.dtype:
        raise ValueError(
            f"one dtype is needed, got x {x_TD.dtype}, gate_up {w_gate_up_eGD.dtype}, down {w_down_eDF.dtype}"
        )
    if x_TD.dtype not in DTYPES[backend]:
        allowed = ", ".join(map(str, DTYPES[backend]))
        raise ValueError(f"dtype {x_TD.dtype} is not supported by backend={backend!r}; allowed: {allowed}")
    wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    if weights_TK.dtype != wide:
        raise ValueError(f"weights must be {wide} for x of {x_TD.dtype}, got {weights_TK.dtype}")


@torch.library.custom_op("joulemoe::expert_mlp", mutates_args=())
def _forward(  # noqa: PLR0917 - an operator's schema
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    w_down_eDF: Tensor,
    weights_TK: Tensor,
    order_N: Tensor,
    inverse_N: Tensor,
    ends_e: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y_TD, and h_NG: gate and up of each row of expert order; rows of sentinels are left as they are."""
    index = order_N.contiguous(), inverse_N.contiguous(), ends_e.contiguous()
    return _implementation(backend).expert_mlp_fwd(  # type: ignore[no-any-return]
        x_TD.contiguous(), w_gate_up_eGD.contiguous(), w_down_eDF.contiguous(), weights_TK.contiguous(), index
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
    h_NG: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the two weights of the experts, and the combine weights."""
    index = order_N.contiguous(), inverse_N.contiguous(), ends_e.contiguous()
    return _implementation(backend).expert_mlp_bwd(  # type: ignore[no-any-return]
        grad_TD.contiguous(),
        (x_TD.contiguous(), w_gate_up_eGD.contiguous(), w_down_eDF.contiguous(), weights_TK.contiguous()),
        index,
        h_NG,
    )


@_backward.register_fake
def _(
    _: Tensor, x_TD: Tensor, w_gate_up_eGD: Tensor, w_down_eDF: Tensor, weights_TK: Tensor, *__: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, gate_up, down, weights = (t.new_empty(t.shape) for t in (x_TD, w_gate_up_eGD, w_down_eDF, weights_TK))
    return x, gate_up, down, weights


def _implementation(backend: str) -> ModuleType:
    # Not at the top: triton is imported where its kernels run, and exists on Linux only.
    if backend == "triton":
        from moe.kernels.expert_mlp import triton_kernel

        return triton_kernel
    from moe.kernels.expert_mlp import torch_backend

    return torch_backend


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    _, h_NG = output
    ctx.mark_non_differentiable(h_NG)
    ctx.set_materialize_grads(False)  # h has no gradient: no zeros of its size
    ctx.save_for_backward(*tensors, h_NG)


def _gradient(ctx: Any, grad_TD: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_TD is None:
        return (None,) * 8
    return *_backward(grad_TD, *ctx.saved_tensors, ctx.backend), None, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)
