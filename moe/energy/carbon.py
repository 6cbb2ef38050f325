"""Location-based carbon of energy by the hour, from factors that the user gives.

The file is CSV. Its first lines, which begin with `#`, hold `# source: TEXT`; then come a header and one line
an hour:

    # source: who published these factors, and which version
    start,g_per_kwh,renewable_share
    2026-11-23T00:00+09:00,512,0.31

`start` is ISO 8601 with an offset from UTC, at a full hour. `renewable_share`, of the grid's mix, may be left
out. An hour that the file lacks has no factor, and energy spent in it makes the carbon unknown.
"""

from __future__ import annotations

import csv
import datetime
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moe.errors import InputError

HOUR_S = 3600
J_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Span:
    """Energy spent evenly between two moments.

    Attributes:
        start_s: Seconds since 1970, UTC.
        end_s: Likewise.
        energy_j: Joules in between.
    """

    start_s: float
    end_s: float
    energy_j: float


@dataclass(frozen=True)
class HourFactor:
    """The grid in one hour.

    Attributes:
        g_per_kwh: CO2 of the mix.
        renewable_share: Of the mix; None where the file does not say.
    """

    g_per_kwh: float
    renewable_share: float | None


@dataclass(frozen=True)
class HourlyFactors:
    """Factors by the hour, numbered from 1970, and who states them."""

    source: str
    by_hour: Mapping[int, HourFactor]


@dataclass(frozen=True)
class Carbon:
    """What some energy emitted.

    Attributes:
        g: Grams of CO2; None if an hour has no factor.
        renewable_share: Of the grid's mix, weighted by energy; None if an hour has no share.
        missing_hours: Hours in which energy was spent and for which the file has no factor.
    """

    g: float | None
    renewable_share: float | None
    missing_hours: int


def carbon_of(spans: Iterable[Span], factors: HourlyFactors) -> Carbon:
    """Carbon of energy, each hour's at that hour's factor."""
    by_hour = energy_by_hour(spans)
    known = {hour: factors.by_hour[hour] for hour in by_hour if hour in factors.by_hour}
    missing = len(by_hour) - len(known)
    if missing:
        return Carbon(None, None, missing)
    grams = math.fsum(joules / J_PER_KWH * known[hour].g_per_kwh for hour, joules in by_hour.items())
    return Carbon(grams, _renewable_share(by_hour, known), 0)


def _renewable_share(by_hour: Mapping[int, float], known: Mapping[int, HourFactor]) -> float | None:
    total_j = math.fsum(by_hour.values())
    shares = [(joules, known[hour].renewable_share) for hour, joules in by_hour.items()]
    if not total_j or any(share is None for _, share in shares):
        return None
    return math.fsum(joules * (share or 0.0) for joules, share in shares) / total_j


def energy_by_hour(spans: Iterable[Span]) -> dict[int, float]:
    """Joules of each hour since 1970; a span is cut at full hours."""
    by_hour: dict[int, float] = {}
    for span in spans:
        for hour, joules in _cut(span):
            by_hour[hour] = by_hour.get(hour, 0.0) + joules
    return by_hour


def _cut(span: Span) -> Iterator[tuple[int, float]]:
    length_s = span.end_s - span.start_s
    first, last = int(span.start_s // HOUR_S), int(span.end_s // HOUR_S)
    if length_s <= 0 or first == last:
        yield first, span.energy_j
        return
    for hour in range(first, last + 1):
        inside_s = min(span.end_s, (hour + 1) * HOUR_S) - max(span.start_s, hour * HOUR_S)
        if inside_s > 0:
            yield hour, span.energy_j * inside_s / length_s


def read_hourly_factors(path: Path) -> HourlyFactors:
    """Read the file that the head of this module describes.

    Raises:
        InputError: It is missing, has no source, or a line is wrong; the text names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"--hourly-factors {path}: {error.strerror}") from error
    comments = [line[1:].strip() for line in lines if line.startswith("#")]
    sources = [line.removeprefix("source:").strip() for line in comments if line.startswith("source:")]
    if not any(sources):
        raise InputError(f"{path}: begin the file with a line `# source: TEXT`, who states the factors")
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    if not {"start", "g_per_kwh"} <= {*(rows.fieldnames or ())}:
        raise InputError(f"{path}: the header must name start and g_per_kwh, it is {rows.fieldnames}")
    by_hour: dict[int, HourFactor] = {}
    for number, row in enumerate(rows, 1):
        try:
            hour, factor = _parse(row)
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}, data line {number}: {error}") from error
        if hour in by_hour:
            raise InputError(f"{path}, data line {number}: {row['start']} is there twice")
        by_hour[hour] = factor
    return HourlyFactors(next(filter(None, sources)), by_hour)


def _parse(row: Mapping[str, str]) -> tuple[int, HourFactor]:
    start = datetime.datetime.fromisoformat(row["start"])
    if start.tzinfo is None:
        raise ValueError(f"start {row['start']} has no offset from UTC; write 2026-11-23T00:00+09:00")
    hour, rest_s = divmod(start.timestamp(), HOUR_S)
    if rest_s:
        raise ValueError(f"start {row['start']} is not a full hour")
    grams, share = float(row["g_per_kwh"]), row.get("renewable_share")
    if not (math.isfinite(grams) and grams >= 0):
        raise ValueError(f"g_per_kwh {grams} must be 0 or more")
    renewable = float(share) if share else None
    if renewable is not None and not 0 <= renewable <= 1:
        raise ValueError(f"renewable_share {renewable} must be between 0 and 1")
    return int(hour), HourFactor(grams, renewable)
