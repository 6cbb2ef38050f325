"""Whether results are right. What is not right is reported as wrong and never timed.

Two rules for the output and every gradient: the largest error is at most twice that of plain torch in the
same dtype (QuACK's tests), and 1 - 2<x, y> / (|x|^2 + |y|^2) stays below a limit (DeepGEMM's calc_diff), or
below twice that of plain torch, which with bf16 combine weights is past the limit itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.problem import Problem, exact_and_plain

# Half of a squared relative error. fp32: TF32 products would be at 1e-7. FP8: DeepGEMM's, of one product.
LARGEST_DIFFERENCE = {torch.float32: 1e-10, torch.bfloat16: 1e-5}
LARGEST_OF_AN_FP8_PRODUCT = 1e-3
# Of the largest exact value: an error that counts as none where plain torch is right by luck.
FLOOR = {torch.float32: 5e-7, torch.bfloat16: 2e-3}


@dataclass
class Errors:
    """How far one result is from the exact one, collected slice by slice."""

    largest: float = 0.0
    squared: float = 0.0
    squares: float = 0.0  # of both, what the squared error is relative to

    def add(self, found: Tensor, exact: Tensor) -> None:
        """Count one slice."""
        error = found.to(exact.dtype) - exact
        self.largest = _largest(self.largest, error)
        self.squared += float(error.double().square().sum())
        self.squares += float(found.double().square().sum() + exact.double().square().sum())

    @property
    def difference(self) -> float:
        """DeepGEMM's measure without its cancellation; 0 for two zeros."""
        return self.squared / self.squares if self.squares else self.squared


@dataclass
class Verdict:
    """On one result.

    Attributes:
        found: its errors.
        plain: those of plain torch in the same dtype.
        largest: exact value.
    """

    found: Errors
    plain: Errors
    largest: float = 0.0

    def add(self, found: Tensor, exact: Tensor, plain: Tensor) -> None:
        """Count one slice."""
        if exact.numel():
            self.found.add(found, exact)
            self.plain.add(plain, exact)
            self.largest = _largest(self.largest, exact)

    def complaint(self, dtype: torch.dtype, fp8_products: int) -> str | None:
        """What is wrong, if anything is; NaN always is.

        Args:
            dtype: of the results.
            fp8_products: in a row; with any, only the second rule holds, of so many products.
        """
        if fp8_products:
            return self._complaint_of_difference(fp8_products * LARGEST_OF_AN_FP8_PRODUCT)
        if not self.found.largest <= 2 * self.plain.largest + FLOOR[dtype] * self.largest:
            return f"errs by {self.found.largest:.3g}, plain torch by {self.plain.largest:.3g}"
        return self._complaint_of_difference(max(LARGEST_DIFFERENCE[dtype], 2 * self.plain.difference))

    def _complaint_of_difference(self, allowed: float) -> str | None:
        if not self.found.difference < allowed:
            return f"differs by {self.found.difference:.3g}, allowed {allowed:.3g}"
        return None


def judge(problem: Problem, found: Mapping[str, Tensor]) -> dict[str, Verdict]:
    """A verdict on each result of a layer, by name.

    Args:
        problem: what was computed.
        found: a tensor for each of RESULTS.
    """
    verdicts = {name: Verdict(Errors(), Errors()) for name in found}
    for name, expert, exact, plain in exact_and_plain(problem):
        verdicts[name].add(found[name] if expert is None else found[name][expert], exact, plain)
    return verdicts


def complaints(verdicts: Mapping[str, Verdict], dtype: torch.dtype, fp8_products: int = 0) -> str:
    """What is wrong with which result; empty if all of them are right."""
    texts = ((name, verdict.complaint(dtype, fp8_products)) for name, verdict in verdicts.items())
    return "; ".join(f"{name} {text}" for name, text in texts if text)


def _largest(before: float, values: Tensor) -> float:
    now = float(values.abs().max())
    return now if now > before or math.isnan(now) else before  # keeps a NaN, which no comparison does
