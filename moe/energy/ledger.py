"""The ledger of a site: what runs drew, cost and emitted, each figure with its source or `unknown`.

Chain: joules of the run's meter -> joules of all IT equipment (from the run's report, where it says how) ->
facility, by the site's PUE -> yen, by its price, and grams of CO2, by the grid's factor of each hour. A link
that no source states makes everything behind it unknown; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe.energy.carbon import J_PER_KWH, HourlyFactors, Span, carbon_of, read_hourly_factors
from moe.energy.run_energy import RunEnergy, StartEnergy, read_run_energy, total
from moe.errors import InputError
from moe.planner.site import SiteFile, Sourced, read_site_file


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the ledger: a start of a run, a run, or the sum of all runs. None is unknown.

    Attributes:
        kind: Which of the three.
        run: Name of the run; empty for the sum.
        start: Number of the start; 0 for a run and the sum.
        begin_s: Seconds since 1970, UTC.
        end_s: Likewise.
        tokens: That the newest state was trained on; of a start, those that it trained on.
        source: How the joules were obtained.
        boundary: What metered_kwh includes.
        validity: Whether a second instrument supports them.
        metered_kwh: By the run's meter.
        useful_kwh: Of that, what led to the newest state.
        goodput: useful_kwh / metered_kwh.
        it_kwh: Of all IT equipment of the run.
        it_basis: `measured` or `estimated`; `unknown` without it_kwh.
        facility_kwh: With cooling and losses of the site.
        yen: Electricity at the facility.
        metered_co2_kg: Location-based, of metered_kwh.
        facility_co2_kg: Location-based, of facility_kwh.
        grid_renewable_share: Of the grid's mix in those hours.
        tokens_per_j: tokens by metered_kwh; None too where these are invalid.
    """

    kind: str
    run: str
    start: int
    begin_s: float
    end_s: float
    tokens: int
    source: str
    boundary: str
    validity: str
    metered_kwh: float | None
    useful_kwh: float | None
    goodput: float | None
    it_kwh: float | None
    it_basis: str
    facility_kwh: float | None
    yen: float | None
    metered_co2_kg: float | None
    facility_co2_kg: float | None
    grid_renewable_share: float | None
    tokens_per_j: float | None


@dataclass(frozen=True)
class Ledger:
    """What is filed.

    Attributes:
        site: Its figures and their sources.
        factors: Of the hours; None: the site's figure of a year is taken.
        entries: Of each run its starts, then the run; at last the sum.
        notes: What a reader must know, one sentence each.
    """

    site: SiteFile
    factors: HourlyFactors | None
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Grid:
    """Turns joules by time into grams."""

    site: SiteFile
    factors: HourlyFactors | None

    def carbon_kg(self, spans: Sequence[Span], energy_j: float | None) -> tuple[float | None, float | None]:
        """Kilograms of CO2 and the grid's renewable share; None where a factor is missing."""
        if energy_j is None:
            return None, None
        if self.factors is None:
            factor = figure(self.site.grid_g_per_kwh)
            return (None if factor is None else energy_j / J_PER_KWH * factor / 1e3), None
        carbon = carbon_of(spans, self.factors)
        return (None if carbon.g is None else carbon.g / 1e3), carbon.renewable_share


def make_ledger(run_dirs: Sequence[Path], *, site: str, hourly_factors: Path | None) -> Ledger:
    """Read runs, a site and its grid, and account for them.

    Args:
        run_dirs: Folders of runs; a killed or running one counts with what it has spent.
        site: Name or file of a site.
        hourly_factors: The grid by the hour; see moe.energy.carbon. None takes the site's figure of a year.

    Raises:
        InputError: A folder, the site or the factors cannot be read, or a folder is named twice.
    """
    if len({path.resolve() for path in run_dirs}) < len(run_dirs):
        raise InputError("a run folder is named twice; its joules would be counted twice")
    file = read_site_file(site)
    factors = None if hourly_factors is None else read_hourly_factors(hourly_factors)
    runs = [read_run_energy(path) for path in run_dirs]
    grid = _Grid(file, factors)
    of_runs = [_run_entry(run, grid) for run in runs]
    entries = [
        entry
        for run, own in zip(runs, of_runs, strict=True)
        for entry in (*(_start_entry(run, start, grid) for start in run.starts), own)
    ]
    return Ledger(file, factors, (*entries, _sum_entry(of_runs)), tuple(_notes(runs, grid, of_runs)))


def _run_entry(run: RunEnergy, grid: _Grid) -> Entry:
    return _entry(run, grid, spans=run.spans, energy_j=run.energy_j, useful_j=run.useful_j)


def _start_entry(run: RunEnergy, start: StartEnergy, grid: _Grid) -> Entry:
    return _entry(run, grid, spans=start.spans, energy_j=start.energy_j, useful_j=start.useful_j, start=start)


def _entry(
    run: RunEnergy,
    grid: _Grid,
    *,
    spans: Sequence[Span],
    energy_j: float | None,
    useful_j: float | None,
    start: StartEnergy | None = None,
) -> Entry:
    tokens = run.tokens if start is None else start.tokens
    it_j = times(energy_j, _it_factor(run))
    facility_j = _facility_j(run, it_j, grid.site)
    metered_kg, renewable = grid.carbon_kg(spans, energy_j)
    return Entry(
        kind="run" if start is None else "start",
        run=run.name,
        start=0 if start is None else start.number,
        begin_s=(start or run.starts[0]).begin_s,
        end_s=(start or run.starts[-1]).end_s,
        tokens=tokens,
        source=run.source,
        boundary=run.boundary,
        validity=run.validity,
        metered_kwh=kwh(energy_j),
        useful_kwh=kwh(useful_j),
        goodput=ratio(useful_j, energy_j),
        it_kwh=kwh(it_j),
        it_basis=run.it_level.basis if run.it_level is not None and it_j is not None else "unknown",
        facility_kwh=kwh(facility_j),
        yen=times(kwh(facility_j), figure(grid.site.yen_per_kwh)),
        metered_co2_kg=metered_kg,
        facility_co2_kg=times(metered_kg, ratio(facility_j, energy_j)),
        grid_renewable_share=renewable,
        tokens_per_j=None if run.validity == "invalid" else ratio(tokens, energy_j),
    )


def _it_factor(run: RunEnergy) -> float | None:
    """Joules of all IT equipment for each joule of the meter, as the run's report has both."""
    return None if run.it_level is None else ratio(run.it_level.energy_j, run.levels[0].energy_j)


def _facility_j(run: RunEnergy, it_j: float | None, site: SiteFile) -> float | None:
    if run.boundary == "facility":
        return it_j  # metered behind the site's own meter: cooling is in it
    return times(it_j, figure(site.pue))


def _sum_entry(runs: Sequence[Entry]) -> Entry:
    """All runs; joules of different boundaries have no sum."""
    alike = len({run.boundary for run in runs}) == 1
    metered = total([run.metered_kwh for run in runs]) if alike else None
    useful = total([run.useful_kwh for run in runs]) if alike else None
    shares = [times(run.grid_renewable_share, run.metered_kwh) for run in runs]
    tokens = sum(run.tokens for run in runs)
    invalid = any(run.validity == "invalid" for run in runs)
    return Entry(
        kind="sum",
        run="",
        start=0,
        begin_s=min(run.begin_s for run in runs),
        end_s=max(run.end_s for run in runs),
        tokens=tokens,
        source=_joined(run.source for run in runs),
        boundary=_joined(run.boundary for run in runs),
        validity=_joined(run.validity for run in runs),
        metered_kwh=metered,
        useful_kwh=useful,
        goodput=ratio(useful, metered),
        it_kwh=total([run.it_kwh for run in runs]),
        it_basis=_joined(run.it_basis for run in runs),
        facility_kwh=total([run.facility_kwh for run in runs]),
        yen=total([run.yen for run in runs]),
        metered_co2_kg=total([run.metered_co2_kg for run in runs]) if alike else None,
        facility_co2_kg=total([run.facility_co2_kg for run in runs]),
        grid_renewable_share=ratio(total(shares), metered),
        tokens_per_j=None if invalid else ratio(tokens, times(metered, J_PER_KWH)),
    )


def _joined(values: Iterable[str]) -> str:
    return " + ".join(sorted(set(values)))


def _notes(runs: Sequence[RunEnergy], grid: _Grid, entries: Sequence[Entry]) -> list[str]:
    notes = []
    estimated = [run.name for run in runs if run.source == "estimated"]
    if estimated:
        notes.append(f"ESTIMATED from a power model, not measured: {', '.join(estimated)}")
    invalid = [run.name for run in runs if run.validity == "invalid"]
    if invalid:
        notes.append(f"INVALID, not to be quoted: {', '.join(invalid)}")
    unfinished = [run.name for run in runs if not run.finished]
    if unfinished:
        notes.append(
            "has not reached its end, so its IT equipment beyond the meter is unknown: "
            + ", ".join(unfinished)
        )
    if grid.factors is None and figure(grid.site.grid_g_per_kwh) is None:
        notes.append("carbon is unknown: the site states no factor of the grid; give --hourly-factors")
    elif grid.factors is None:
        notes.append("carbon is by the site's figure of a whole year, not by the hour")
    else:
        missing = sum(carbon_of(run.spans, grid.factors).missing_hours for run in runs)
        if missing:
            notes.append(
                f"carbon is unknown: the hourly factors lack {missing} hours in which energy was spent"
            )
    if len({entry.boundary for entry in entries}) > 1:
        notes.append("the runs were metered at different boundaries, so their metered joules have no sum")
    return notes


def figure(sourced: object) -> float | None:
    """The number of a site's figure; None where it is unknown."""
    return float(sourced.value) if isinstance(sourced, Sourced) else None


def kwh(energy_j: float | None) -> float | None:
    """Joules in kWh."""
    return None if energy_j is None else energy_j / J_PER_KWH


def times(a: float | None, b: float | None) -> float | None:
    """Their product; None if one of them is unknown."""
    return None if a is None or b is None else a * b


def ratio(a: float | None, b: float | None) -> float | None:
    """Their quotient; None if one of them is unknown, or for nothing by nothing."""
    return None if a is None or b is None or b == 0 else a / b
