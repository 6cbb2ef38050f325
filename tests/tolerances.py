"""The one tolerance table of the project. A test that needs a larger number has found a bug or says why here.

The error of a tensor is its largest absolute difference over the largest absolute value that is expected:
element by element a relative error has no bound where terms cancel. An expected tensor of zeros must come out
as exact zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

# u is the unit roundoff, half the distance from 1 to the next number.
TOLERANCES = {
    # u = 1.1e-16. Sums of a few hundred terms in another order: sqrt(300) u = 2e-15, three GEMMs deep; a
    # computation that slipped into fp32 is wrong by 6e-8.
    torch.float64: 1e-13,
    # u = 6.0e-8. The same sums, 1e-6, with room for another exp; one bf16 rounding is wrong by 2e-3.
    torch.float32: 5e-6,
    # u = 2.0e-3. A gradient through the experts is rounded about six times between sums in fp32, and all may
    # fall the same way: 1.1e-2 was seen, 10 u is allowed.
    torch.bfloat16: 2e-2,
    # u = 4.9e-4, and 10 u for the same reason.
    torch.float16: 5e-3,
}


def assert_close(
    name: str,
    actual: Tensor,
    expected: Tensor,
    *,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> None:
    """Fail unless actual is expected within the table's tolerance; NaN is never close.

    Args:
        name: of the tensor, for the message.
        actual: any dtype.
        expected: of the same shape; usually in higher precision.
        dtype: the row of the table, if something was computed in a coarser dtype than actual has.
        scale: size of the terms, where they cancel to nothing; by default the largest value expected.
    """
    tolerance = TOLERANCES[dtype or actual.dtype]
    if scale is None:
        scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.detach().double(),
        expected.detach().double(),
        rtol=0,
        atol=tolerance * scale,
        msg=lambda text: f"{name} ({actual.dtype}, tolerance {tolerance} of {scale:.3g}): {text}",
    )


# DeepGEMM's measure, 1 - 2<x, y> / (|x|^2 + |y|^2), and what its tests allow. It is a mean: of fewer elements
# it says more about chance than about the code.
ENOUGH_ELEMENTS = 1000
LARGEST_DIFFERENCE = {
    torch.float64: 1e-25,
    torch.float32: 1e-10,
    torch.bfloat16: 1e-5,
    torch.float16: 1e-6,
    torch.float8_e4m3fn: 1e-3,
}


def difference(actual: Tensor, expected: Tensor) -> float:
    """1 - 2<x, y> / (|x|^2 + |y|^2): half the squared relative error, whatever the scale; 0 for two zeros."""
    x, y = actual.detach().double(), expected.detach().double()
    total = float(x.square().sum() + y.square().sum())
    # The same number as in the formula, without its cancellation.
    return float((x - y).square().sum()) / total if total else 0.0


def assert_as_good_as_plain(
    name: str, actual: Tensor, plain: Tensor, exact: Tensor, *, dtype: torch.dtype
) -> None:
    """Fail unless actual errs at most twice as much as plain torch in the same dtype, and differs by little.

    Args:
        name: of the tensor, for the message.
        actual: of the code under test, computed in `dtype`.
        plain: of plain torch operations in `dtype`.
        exact: of the same operations in fp64, values of order one.
        dtype: the row of LARGEST_DIFFERENCE. Where plain torch is right by luck, a rounding of the largest
            exact value is allowed, as in QuACK's tests.
    """
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} is not {tuple(exact.shape)}"
    if not exact.numel():
        return
    exact = exact.detach()
    error, plain_error = (float((t.detach().double() - exact).abs().max()) for t in (actual, plain))
    floor = TOLERANCES[dtype] / 10 * float(exact.abs().max())
    assert error <= 2 * plain_error + floor, f"{name} errs by {error:.3g}, plain torch by {plain_error:.3g}"
    if exact.numel() < ENOUGH_ELEMENTS:
        return
    differs = difference(actual, exact)
    assert differs < LARGEST_DIFFERENCE[dtype], f"{name} differs by {differs:.3g} in DeepGEMM's measure"
