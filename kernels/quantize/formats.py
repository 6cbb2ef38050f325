"""What low precision means here: FP8 numbers (e4m3) that share a scale block by block, in three formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

VALUE_DTYPE = torch.float8_e4m3fn
# A scale is a block's largest number over that of VALUE_DTYPE, 448: a product, since division is slow.
INVERSE_LARGEST = 1 / 448
SMALLEST_SCALE = 2.0**-126  # the smallest normal number of fp32, the scale of zeros

# Rows of one expert begin a new tile where blocks go down the rows, so that no block holds two experts' rows.
ROW_TILE = 128


@dataclass(frozen=True)
class Format:
    """How long a block is and what its scale looks like.

    Attributes:
        block: numbers that share a scale, along the dimension that a GEMM sums over.
        power_of_two: scales are powers of two, rounded up, so that no number of the block overflows.
        scale_dtype: as scales are stored.
    """

    block: int
    power_of_two: bool
    scale_dtype: torch.dtype


class Quantized(NamedTuple):
    """Numbers and the scales of their blocks."""

    values: Tensor
    scales: Tensor


FORMATS = {
    # DeepSeek-V3, arXiv 2412.19437 section 3.3; a tensor core of sm_90 knows no scales, so 128 products are
    # added before a scale is applied.
    "fp8": Format(128, False, torch.float32),
    # The same with scales that multiply without rounding, as DeepSeek-V3.1 was trained (UE8M0).
    "fp8_power_of_two": Format(128, True, torch.float32),
    # OCP Microscaling Formats 1.0, whose scales sm_100 applies itself. The conversion that the standard
    # describes rounds scales down and clips the largest numbers; rounded up, as in arXiv 2506.08027, training
    # holds.
    "mxfp8": Format(32, True, torch.float8_e8m0fnu),
}


def format_named(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"format={name!r} is unknown; allowed: {', '.join(FORMATS)}")
    return FORMATS[name]
