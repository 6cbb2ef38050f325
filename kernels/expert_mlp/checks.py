"""What expert_mlp refuses, before anything is computed. Shapes as in op.py."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels.expert_mlp.activation import ACTIVATIONS
from moe.kernels.expert_mlp.variant import Variant
from moe.kernels.quantize.formats import FORMATS

DTYPES = {
    "torch": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def check_shapes(x_TD: Tensor, w_gate_up_eGD: Tensor, w_down_eDF: Tensor, weights_TK: Tensor) -> None:
    """Sizes that fit together."""
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


def check_index(order_N: Tensor, inverse_N: Tensor, ends_e: Tensor, sizes: tuple[int, int]) -> None:
    """An index of that many pairs and experts, `sizes`."""
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


def check_dtypes(
    x_TD: Tensor, w_gate_up_eGD: Tensor, w_down_eDF: Tensor, weights_TK: Tensor, backend: str
) -> None:
    """Dtypes that the backend computes in."""
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


def check_variant(variant: Variant, w_gate_up_eGD: Tensor, w_down_eDF: Tensor, precision: str) -> None:
    """The activation, the biases, and whether they go with the precision."""
    if variant.activation not in ACTIVATIONS:
        raise ValueError(f"activation={variant.activation!r} is unknown; allowed: {', '.join(ACTIVATIONS)}")
    if precision != "wide" and (variant.biases is not None or variant.activation != "swiglu"):
        biases = "no biases" if variant.biases is None else "biases"
        raise ValueError(
            f"precision={precision!r} takes swiglu experts without biases, got {variant.activation} with "
            f"{biases}; use precision='wide'"
        )
    if variant.biases is None:
        return
    expected = [tuple(w_gate_up_eGD.shape[:2]), tuple(w_down_eDF.shape[:2])]
    shapes = [tuple(bias.shape) for bias in variant.biases]
    dtypes = {bias.dtype for bias in variant.biases}
    if shapes != expected or dtypes != {w_down_eDF.dtype}:
        found = f"{', '.join(map(str, dtypes))} of {shapes}"
        raise ValueError(f"biases must be {w_down_eDF.dtype} of shapes {expected}, got {found}")


def check_low_precision(precision: str, *, compress_h: bool, wide_into_activation: bool) -> None:
    """Options of precisions that quantise."""
    options = {"compress_h": compress_h, "wide_into_activation": wide_into_activation}
    chosen = [name for name, is_on in options.items() if is_on]
    if chosen and precision == "wide":
        raise ValueError(
            f"{' with '.join(chosen)} needs a precision of {', '.join(FORMATS)}, got {precision!r}"
        )
    if len(chosen) > 1:
        raise ValueError(
            "compress_h rounds the h that wide_into_activation keeps wide; leave out one of the two"
        )


def check_main_grads(
    main_grads: tuple[Tensor, Tensor] | None, w_gate_up_eGD: Tensor, w_down_eDF: Tensor, precision: str
) -> None:
    """What the gradients of the two weights may be added to."""
    if main_grads is None:
        return
    if precision != "wide":
        raise ValueError(f"main_grads go with precision='wide', got {precision!r}")
    if torch.compiler.is_compiling():
        # It saves them for the backward: where two forwards wait, the second backward finds them changed.
        raise ValueError(
            "main_grads do not go with torch.compile; compile without them, or without fullgraph"
        )
    for name, main, weight in zip(("gate_up", "down"), main_grads, (w_gate_up_eGD, w_down_eDF), strict=True):
        if main.dtype != torch.float32 or main.shape != weight.shape or not main.is_contiguous():
            raise ValueError(
                f"main_grads of {name} must be contiguous torch.float32 of shape {tuple(weight.shape)}, got "
                f"{main.dtype} of {tuple(main.shape)}"
            )
        if torch.is_grad_enabled() and not weight.requires_grad:
            raise ValueError(f"main_grads need weights that require gradients, {name} does not; pass None")
