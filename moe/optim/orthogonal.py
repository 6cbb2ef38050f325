"""The nearest matrix with orthonormal rows or columns, by Newton-Schulz iterations.

Shapes: b matrices, N rows, M columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Keller Jordan, https://kellerjordan.github.io/posts/muon: an odd polynomial that lifts small singular values
# fast and leaves all of them in about 0.7 to 1.2 after five steps. Moonlight (arXiv 2502.16982) keeps them.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
_TINY = 1e-7  # a matrix of zeros stays one


def orthogonalize(x_bNM: Tensor) -> Tensor:
    """Every singular value of each matrix becomes about 1; in the dtype of the input.

    The scale of a matrix has no effect. bf16 is precise enough, says the source.

    Args:
        x_bNM: any number of leading dimensions.
    """
    wide = x_bNM.shape[-2] > x_bNM.shape[-1]
    # The product with itself is then the smaller one.
    x = (x_bNM.mT if wide else x_bNM).reshape(-1, min(x_bNM.shape[-2:]), max(x_bNM.shape[-2:]))
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_TINY)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = torch.bmm(x, x.mT)
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    return (x.mT if wide else x).reshape(x_bNM.shape)


def update_scale(rows: int, columns: int) -> float:
    """Factor that gives an orthogonal update the root mean square of AdamW's (Moonlight, section 2.2).

    So both share learning rate and weight decay.
    """
    return 0.2 * math.sqrt(max(rows, columns))
