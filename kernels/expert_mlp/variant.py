"""What may differ from plain SwiGLU experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Variant:
    """Of one call.

    Attributes:
        activation: of activation.ACTIVATIONS.
        biases: of gate and up [e, 2F], and of the down projection [e, D].
    """

    activation: str = "swiglu"
    biases: tuple[Tensor, Tensor] | None = None


PLAIN = Variant()
