"""Memory that nobody wrote is poison: a kernel that reads it gives NaN, not yesterday's right answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty holds NaN, or the largest integer. torch does that with deterministic algorithms only."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
