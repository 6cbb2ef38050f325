"""Rotary position embedding (RoFormer, arXiv 2104.09864) and its stretch to longer contexts (YaRN).

Angles are fp32, the rotation too. Shapes: S sequence, B batch, H heads, d head size, r rotated part of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe.config.schema import AttentionSection, YarnSection


def inverse_frequencies(attention: AttentionSection, rotary_dim: int) -> Tensor:
    """Radians that each of the rotary_dim / 2 pairs turns a position, fp32; pair 0 is the fastest.

    Args:
        attention: the base, and YaRN's settings.
        rotary_dim: r, even.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    plain = 1.0 / attention.rope_base**exponents
    if attention.yarn.factor == 1:
        return plain
    slowed = _slowed_share(attention.yarn, attention.rope_base, rotary_dim)
    return plain / attention.yarn.factor * slowed + plain * (1 - slowed)


def _slowed_share(yarn: YarnSection, base: float, rotary_dim: int) -> Tensor:
    """From 0 for pairs that turn beta_fast times over the original length to 1 at beta_slow (section 3.2)."""
    first, last = (_pair_turning(turns, yarn, base, rotary_dim) for turns in (yarn.beta_fast, yarn.beta_slow))
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    width = last - first if last != first else 0.001  # published models were trained with this very number
    return ((torch.arange(rotary_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)


def _pair_turning(turns: float, yarn: YarnSection, base: float, rotary_dim: int) -> float:
    """Index, with a fraction, of the pair that turns so many times over the original length."""
    return rotary_dim * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))


def rotate_pairs(
    x_SBHr: Tensor, frequencies: Tensor, positions_S: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """Turn neighbouring elements (2i, 2i + 1) by position * frequency i, as DeepSeek-V3 does.

    Args:
        x_SBHr: rotated part of each head.
        frequencies: [r / 2], radians a position.
        positions_S: of the first dimension's elements; None is their index.
        scale: multiplies the result.
    """
    cos, sin = _cos_sin(x_SBHr, frequencies, positions_S, scale)
    a, b = x_SBHr.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x_SBHr.dtype)


def rotate_halves(
    x_SBHd: Tensor, frequencies: Tensor, positions_S: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """Turn elements (i, i + r / 2) of the first r by position * frequency i; the other d - r stay.

    Arguments as of `rotate_pairs`.
    """
    cos, sin = _cos_sin(x_SBHd, frequencies, positions_S, scale)
    r = 2 * frequencies.numel()
    a, b = x_SBHd[..., :r].float().chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_SBHd.dtype)
    return turned if r == x_SBHd.shape[-1] else torch.cat([turned, x_SBHd[..., r:]], dim=-1)


def _cos_sin(
    x: Tensor, frequencies: Tensor, positions_S: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """[S, 1, 1, r / 2] each."""
    if positions_S is None:
        positions_S = torch.arange(x.shape[0], device=x.device)
    angle = torch.outer(positions_S.float(), frequencies)[:, None, None, :]
    return angle.cos() * scale, angle.sin() * scale
