"""The gated activations of experts in plain torch; the Triton ones are in triton_activation.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# swiglu: silu(gate) * up (arXiv 2002.05202). geglu: gelu(gate) * up, the same paper, GELU by its erf.
# clamped_swiglu: gpt-oss, gate * sigmoid(1.702 gate) * (up + 1) of clamped gate and up.
ACTIVATIONS = ("swiglu", "geglu", "clamped_swiglu")
CLAMP = 7.0
CLAMPED_SLOPE = 1.702

aten = torch.ops.aten  # torch's fused backward of one activation


def gated(gate: Tensor, activation: str) -> Tensor:
    """The factor that gate contributes; differentiable. `activation` is of ACTIVATIONS."""
    if activation == "swiglu":
        return F.silu(gate)
    if activation == "geglu":
        return F.gelu(gate)
    gate = gate.clamp(max=CLAMP)
    return gate * torch.sigmoid(CLAMPED_SLOPE * gate)


def activated(value: Tensor, up: Tensor, activation: str) -> Tensor:
    """The activation; differentiable.

    Args:
        value: what `gated` made of gate.
        up: the same shape.
        activation: of ACTIVATIONS.
    """
    return value * (up.clamp(-CLAMP, CLAMP) + 1 if activation == "clamped_swiglu" else up)


def activation_backward(
    gate: Tensor, up: Tensor, value: Tensor, grad_a: Tensor, *, activation: str, out: tuple[Tensor, Tensor]
) -> None:
    """Write the gradients of gate and of up.

    Args:
        gate: any shape.
        up: the same shape.
        value: of `gated`.
        grad_a: gradient of the activation; it is overwritten.
        activation: of ACTIVATIONS.
        out: where the two go, in any floating dtype.
    """
    if activation != "clamped_swiglu":
        torch.mul(grad_a, value, out=out[1])
        backward = aten.silu_backward if activation == "swiglu" else aten.gelu_backward
        backward.grad_input(grad_a.mul_(up), gate, grad_input=out[0])
        return
    torch.mul(grad_a, value * ((up >= -CLAMP) & (up <= CLAMP)), out=out[1])
    share = torch.sigmoid(CLAMPED_SLOPE * gate)
    by_gate = share * (1 + CLAMPED_SLOPE * gate * (1 - share)) * (gate <= CLAMP)
    torch.mul(grad_a.mul_(up.clamp(-CLAMP, CLAMP) + 1), by_gate, out=out[0])
