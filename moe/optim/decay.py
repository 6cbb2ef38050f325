"""Which parameters weight decay acts on, in both engines."""

from __future__ import annotations

from torch import Tensor

BIASES = (".bias", ".b_gate_up_eG", ".b_down_eD")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter: not on norms and biases, but on all of the router.

    Args:
        name: in its model.
        parameter: of any dtype.
    """
    return ".router." in name or not (name.endswith(BIASES) or parameter.dim() == 1)
