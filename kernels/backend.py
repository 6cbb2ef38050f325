"""Which implementation of an op runs: `triton` on CUDA, `torch` anywhere. A named one is used or refused."""

from __future__ import annotations

import os
from typing import Literal, cast

import torch

Backend = Literal["triton", "torch"]
BACKENDS = ("auto", "triton", "torch")


def choose_backend(backend: str, tensor: torch.Tensor) -> Backend:
    """The implementation for an op on `tensor`.

    Args:
        backend: `auto` takes triton on CUDA and torch elsewhere.
        tensor: the op's main input.

    Raises:
        ValueError: the name is unknown, or triton is asked for on a device that it cannot run on.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; allowed: {', '.join(BACKENDS)}")
    if backend == "auto":
        return "triton" if tensor.is_cuda else "torch"
    if backend == "triton" and not tensor.is_cuda and not interpreted():
        raise ValueError(
            f"backend='triton' needs a CUDA tensor, got one on {tensor.device}; use 'auto' or 'torch', "
            "or set TRITON_INTERPRET=1 before triton is imported to run its interpreter in a test"
        )
    return cast(Backend, backend)


def interpreted() -> bool:
    """Whether Triton's kernels run in its CPU interpreter, as tests without a GPU have them."""
    return os.environ.get("TRITON_INTERPRET") == "1"
