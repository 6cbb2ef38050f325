"""Legs in, summaries and verdicts out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.ab_statistics import LEAST_PAIRS, Interval, compare, mean_interval
from benchmarks.tokens_per_joule_record import (
    AgainstRecord,
    EnergyLabel,
    Estimate,
    Leg,
    PeakShare,
    Summary,
    TargetLoss,
)
from moe.energy.steady_state import resolution
from moe.metering.energy import VALIDITIES

METHOD = (
    "legs alternate a, b; least squares on log tokens/J with a term for steady drift; 95 % Student t "
    "interval with 2n - 3 degrees of freedom; better or worse only if the whole interval is beyond the "
    "meter's resolution and no leg's energy is invalid"
)


def summarize(legs: Sequence[Leg], name: str) -> Summary:
    """All legs of one config under one routing and one cap."""
    first = legs[0]
    per_j = mean_interval([leg.tokens_per_j for leg in legs])
    per_token = first.work.flops_per_token
    return Summary(
        kind="summary",
        schema_version=1,
        run_id=first.run_id,
        mode=first.mode,
        role=first.role,
        name=name,
        routing=first.routing,
        is_upper_bound=first.is_upper_bound,
        power_cap_w=first.power_cap_w,
        energy=label(legs),
        tokens_per_j=estimate(per_j, len(legs)),
        active_param_tokens_per_j=_scaled(per_j, first.work.params_active, len(legs)),
        model_flop_per_j=_scaled(per_j, per_token, len(legs)),
        tokens_per_s=estimate(mean_interval([leg.tokens_per_s for leg in legs]), len(legs)),
        of_peak=[
            PeakShare(
                percent=100 * per_j.mean * per_token / share.peak_flop_per_j,
                peak_flop_per_j=share.peak_flop_per_j,
                basis=share.basis,
            )
            for share in first.of_peak
        ],
    )


def judge(a: Sequence[Leg], b: Sequence[Leg], names: tuple[str, str]) -> AgainstRecord | None:
    """The verdict on a; None with too few repeats for one."""
    if len(a) < LEAST_PAIRS:
        return None
    legs = [*a, *b]
    energy = label(legs)
    finest = max(resolution(leg.energy.source, leg.seconds) for leg in legs)
    found = compare([leg.tokens_per_j for leg in a], [leg.tokens_per_j for leg in b], resolution=finest)
    return AgainstRecord(
        kind="comparison",
        schema_version=1,
        run_id=a[0].run_id,
        mode=a[0].mode,
        a=names[0],
        b=names[1],
        power_cap_w=a[0].power_cap_w,
        energy=energy,
        ratio=estimate(found.ratio, len(a)),
        pair_ratios=list(found.pair_ratios),
        drift_per_leg=found.drift_per_leg,
        autocorrelation=found.autocorrelation,
        resolution=finest,
        verdict="inconclusive" if energy.validity == "invalid" else found.verdict,
        method=METHOD,
    )


def label(legs: Sequence[Leg | TargetLoss]) -> EnergyLabel:
    """The label of several figures; the worst validity speaks for all of them.

    Raises:
        ValueError: they differ in source or boundary, and so cannot be compared.
    """
    kinds = {(leg.energy.source, leg.energy.boundary) for leg in legs}
    if len(kinds) != 1:
        raise ValueError(f"joules of different kinds cannot be compared: {sorted(kinds)}")
    worst = max((leg.energy.validity for leg in legs), key=VALIDITIES.index)
    return EnergyLabel(source=legs[0].energy.source, boundary=legs[0].energy.boundary, validity=worst)


def estimate(interval: Interval, repeats: int) -> Estimate:
    """An interval as a part of a record."""
    values = asdict(interval)
    return Estimate(mean=values["mean"], ci95_low=values["low"], ci95_high=values["high"], repeats=repeats)


def _scaled(interval: Interval, factor: float, repeats: int) -> Estimate:
    ends = [None if end is None else end * factor for end in (interval.low, interval.high)]
    return estimate(Interval(interval.mean * factor, ends[0], ends[1]), repeats)
