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
    # u = 2.0e-3. A gradient through the experts is rounded about six times between exact sums in fp32, and
    # roundings that all fall the same way add up: 6 u.
    torch.bfloat16: 1.2e-2,
}


def assert_close(name: str, actual: Tensor, expected: Tensor, *, dtype: torch.dtype | None = None) -> None:
    """Fail unless actual is expected within the table's tolerance; NaN is never close.

    Args:
        name: of the tensor, for the message.
        actual: any dtype.
        expected: of the same shape; usually in higher precision.
        dtype: the row of the table, if something was computed in a coarser dtype than actual has.
    """
    tolerance = TOLERANCES[dtype or actual.dtype]
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.detach().double(),
        expected.detach().double(),
        rtol=0,
        atol=tolerance * largest,
        msg=lambda text: f"{name} ({actual.dtype}, tolerance {tolerance} of {largest:.3g}): {text}",
    )
