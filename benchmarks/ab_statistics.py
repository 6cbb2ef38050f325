"""Intervals and verdicts of an A-B-A-B comparison: is a difference in tokens per joule real?

Legs alternate A, B, A, B, ... and everything is done on logarithms, so a difference is a ratio. The logarithm
of leg j is fitted by least squares as

    log y_j = mean + drift * j + effect * (+1/2 for A, -1/2 for B) + noise

and `effect` gets a Student t interval with 2n - 3 degrees of freedom for n pairs. Why so:

- The drift term takes out a machine that warms up or cools down at a steady rate: A always comes first, so
  the plain difference of pairs would call a warming machine a better B.
- Noise that is alike in neighbouring legs (positive autocorrelation, the rule on machines) mostly cancels in
  an alternating contrast, while the residuals keep it: the interval gets wider than need be, never narrower.
  The lag-1 autocorrelation of the residuals is reported; a clearly negative one means that legs disturb their
  successors, and the legs should be longer.
- The steps of one leg are far from independent, so a leg counts as one observation, however long it was.

A verdict other than `inconclusive` needs the whole 95 % interval beyond the meter's resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["better", "worse", "inconclusive"]
CONFIDENCE = 0.95
LEAST_PAIRS = 3  # with two, one degree of freedom is left, and the interval says nothing


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; without an interval (one value), both ends are None."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """A over B.

    Attributes:
        ratio: of A's values to B's, free of steady drift.
        drift_per_leg: relative change from one leg to the next.
        pair_ratios: A over B of each pair, drift included.
        autocorrelation: lag 1, of the residuals.
        resolution: differences below it are the meter's, not the configs'.
        verdict: on A.
    """

    ratio: Interval
    drift_per_leg: float
    pair_ratios: tuple[float, ...]
    autocorrelation: float
    resolution: float
    verdict: Verdict


def compare(a: Sequence[float], b: Sequence[float], *, resolution: float = 0.0) -> Comparison:
    """Compare legs that ran in the order a[0], b[0], a[1], b[1], ...; more is better.

    Args:
        a: positive values of one config.
        b: of the other, as many.
        resolution: relative difference that the meter cannot tell from none.

    Raises:
        ValueError: the numbers of legs differ or are below LEAST_PAIRS, or a value is not positive.
    """
    if len(a) != len(b) or len(a) < LEAST_PAIRS:
        raise ValueError(f"{len(a)} and {len(b)} legs: as many of each are needed, at least {LEAST_PAIRS}")
    logs = _logs([value for pair in zip(a, b, strict=True) for value in pair])
    legs = np.arange(len(logs), dtype=np.float64)
    side = np.where(legs % 2 == 0, 0.5, -0.5)
    design = np.stack([np.ones_like(legs), legs - legs.mean(), side], axis=1)
    coefficients, *_ = np.linalg.lstsq(design, logs, rcond=None)
    residuals = logs - design @ coefficients
    degrees = len(logs) - design.shape[1]
    variance = float(residuals @ residuals) / degrees * np.linalg.inv(design.T @ design)[2, 2]
    ratio = _interval(float(coefficients[2]), math.sqrt(variance), degrees)
    return Comparison(
        ratio=ratio,
        drift_per_leg=math.expm1(float(coefficients[1])),
        pair_ratios=tuple(first / second for first, second in zip(a, b, strict=True)),
        autocorrelation=_lag_one(residuals),
        resolution=resolution,
        verdict=_verdict(ratio, resolution),
    )


def mean_interval(values: Sequence[float]) -> Interval:
    """Geometric mean of positive values with a t interval on their logarithms.

    Raises:
        ValueError: there is no value, or one is not positive.
    """
    logs = _logs(values)
    if len(logs) == 1:
        return Interval(float(values[0]), None, None)
    error = float(logs.std(ddof=1)) / math.sqrt(len(logs))
    return _interval(float(logs.mean()), error, len(logs) - 1)


def _logs(values: Sequence[float]) -> np.ndarray:
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"values must be positive numbers, got {list(values)}")
    return np.log(np.asarray(values, dtype=np.float64))


def _interval(log_mean: float, error: float, degrees: int) -> Interval:
    half = student_t(degrees) * error
    return Interval(math.exp(log_mean), math.exp(log_mean - half), math.exp(log_mean + half))


def _verdict(ratio: Interval, resolution: float) -> Verdict:
    assert ratio.low is not None and ratio.high is not None
    if ratio.low > 1 + resolution:
        return "better"
    return "worse" if ratio.high < 1 - resolution else "inconclusive"


def _lag_one(residuals: np.ndarray) -> float:
    squares = float(residuals @ residuals)
    return float(residuals[1:] @ residuals[:-1]) / squares if squares else 0.0


def student_t(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The two-sided quantile of Student's t: |t| stays below it with probability `confidence`."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _two_sided(middle, degrees) < confidence else (low, middle)
    return high


def _two_sided(t: float, degrees: int) -> float:
    """Probability of |T| < t, in closed form for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    first = degrees % 2
    term, total = (cosine, cosine) if first else (1.0, 1.0)
    for k in range(2 + first, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if not first:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))
