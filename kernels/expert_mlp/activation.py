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


def activated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The activation of one pair of pre-activations; differentiable.

    Args:
        gate: any shape.
        up: the same shape.
        activation: of ACTIVATIONS.
    """
    if activation == "swiglu":
        return F.silu(gate) * up
    if activation == "geglu":
        return F.gelu(gate) * up
    gate = gate.clamp(max=CLAMP)
    return gate * torch.sigmoid(CLAMPED_SLOPE * gate) * (up.clamp(-CLAMP, CLAMP) + 1)


def activation_gradients(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """The activation and its derivatives by gate and by up.

    Args:
        gate: any shape.
        up: the same shape.
        activation: of ACTIVATIONS.
    """
    if activation == "geglu":
        share = 0.5 * (1 + torch.erf(gate * 0.5**0.5))
        density = torch.exp(-0.5 * gate * gate) * (2 * torch.pi) ** -0.5
        return gate * share * up, (share + gate * density) * up, gate * share
    if activation == "swiglu":
        share = gate.sigmoid()
        value = gate * share
        return value * up, up * (share + value * (1 - share)), value
    inside_gate, inside_up = gate <= CLAMP, (up >= -CLAMP) & (up <= CLAMP)
    gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP) + 1
    share = torch.sigmoid(CLAMPED_SLOPE * gate)
    value = gate * share
    by_gate = up * (share + CLAMPED_SLOPE * value * (1 - share)) * inside_gate
    return value * up, by_gate, value * inside_up
