"""The gated activations of experts inside Triton kernels, on fp32 blocks; equations of activation.py."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton has no types: its functions take blocks that exist on the device only.

from __future__ import annotations

import triton
import triton.language as tl

from moe.kernels.expert_mlp import activation as plain

CLAMP = tl.constexpr(plain.CLAMP)
SLOPE = tl.constexpr(plain.CLAMPED_SLOPE)


@triton.jit
def activated(b_gate, b_up, ACTIVATION: tl.constexpr):
    """The activation of a block."""
    if ACTIVATION == "swiglu":
        b_a = b_gate / (1 + tl.exp(-b_gate)) * b_up
    elif ACTIVATION == "geglu":
        b_a = b_gate * 0.5 * (1 + tl.erf(b_gate * 0.7071067811865476)) * b_up
    else:
        b_gate = tl.minimum(b_gate, CLAMP)
        b_up = tl.minimum(tl.maximum(b_up, -CLAMP), CLAMP)
        b_a = b_gate / (1 + tl.exp(-(b_gate * SLOPE))) * (b_up + 1)
    return b_a


@triton.jit
def activation_gradients(b_gate, b_up, ACTIVATION: tl.constexpr):
    """The activation of a block, and its derivatives by gate and by up."""
    if ACTIVATION == "geglu":
        b_share = 0.5 * (1 + tl.erf(b_gate * 0.7071067811865476))
        b_density = tl.exp(-0.5 * b_gate * b_gate) * 0.3989422804014327
        b_value = b_gate * b_share
        b_by_gate = (b_share + b_gate * b_density) * b_up
        b_by_up = b_value
    elif ACTIVATION == "swiglu":
        b_share = 1 / (1 + tl.exp(-b_gate))
        b_value = b_gate * b_share
        b_by_gate = b_up * (b_share + b_value * (1 - b_share))
        b_by_up = b_value
    else:
        is_inside = b_gate <= CLAMP
        b_by_up = ((b_up >= -CLAMP) & (b_up <= CLAMP)).to(tl.float32)
        b_gate = tl.minimum(b_gate, CLAMP)
        b_up = tl.minimum(tl.maximum(b_up, -CLAMP), CLAMP) + 1
        b_share = 1 / (1 + tl.exp(-(b_gate * SLOPE)))
        b_value = b_gate * b_share
        b_by_gate = tl.where(is_inside, b_up * (b_share + b_value * SLOPE * (1 - b_share)), 0.0)
        b_by_up *= b_value
    return b_value * b_up, b_by_gate, b_by_up
