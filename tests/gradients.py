"""Gradients by name, so that a failing comparison says which one."""

from __future__ import annotations

import torch
from torch import Tensor


def gradients(output: Tensor, cotangent: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    """The gradient of sum(output * cotangent) with respect to each named input."""
    grads = torch.autograd.grad(output, list(inputs.values()), cotangent.to(output.dtype))
    return dict(zip(inputs, grads, strict=True))
