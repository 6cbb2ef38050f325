"""What low-precision experts keep of H from the forward to the backward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SavedH(NamedTuple):
    """Gate and up of each row of expert order.

    Attributes:
        values: [N, 2F] in x's dtype, or in fp8 by rows.
        scales: of the blocks of fp8 values, else None.
    """

    values: Tensor
    scales: Tensor | None
