"""The ledger: sums, hours, what is unknown, and what is filed."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe.energy.carbon import Span, carbon_of, energy_by_hour, read_hourly_factors
from moe.energy.ledger import Entry, Ledger, make_ledger
from moe.energy.ledger_page import as_object, as_text, csv_text, html_text
from moe.energy.run_energy import read_run_energy
from moe.errors import InputError
from moe.metering.boundaries import Level
from moe.metering.journal import EnergyJournal
from moe.metering.report import Campaign, Energy, Layout, Report, write_report
from moe.planner.site import read_site_file

ROOT = Path(__file__).parents[2]
SITES = ROOT / "configs" / "sites"
NINE_OCLOCK_S = datetime.datetime(2026, 11, 23, 9, tzinfo=datetime.UTC).timestamp()
SITE = """
name: Trial
name_ja: 試験
pue: {value: 1.25, source: our meters}
grid_g_per_kwh: {value: 400, source: a year's table}
renewable_share: {value: 0.5, source: a contract}
yen_per_kwh: {value: 20, source: a contract}
"""


class Machine:
    """Writes the journal of a run as training does, with a clock and a power of its own."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir()
        recipe = (ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8")
        (run_dir / "config.yaml").write_text(recipe, encoding="utf-8")
        self.run_dir = run_dir
        self.time_s = NINE_OCLOCK_S
        self.totals: dict[str, Any] = {
            "step": 0,
            "energy_j": 0.0,
            "useful_j": 0.0,
            "tokens": 0,
            "wall_s": 0.0,
        }
        self.parts_j: list[float] = []  # what each start really took
        self.validity = "checked"

    def record(self) -> dict[str, Any]:
        labels = {"energy_source": "nvml_counter", "energy_boundary": "gpu", "energy_validity": self.validity}
        return {**self.totals, "node_j": None, **labels}

    def start(self, steps: int, *, lost: int = 0, watts: float = 700.0, end: bool = False) -> None:
        """One start of 10 s a step; the last steps are lost to a kill, as the next checkpoint is older."""
        journal = EnergyJournal(self.run_dir, clock=lambda: self.time_s)
        journal.open(self.record())
        before_j, kept = self.totals["energy_j"], dict(self.totals)
        for step in range(steps):
            self.time_s += 10
            self.totals["energy_j"] += 10 * watts
            self.totals["useful_j"] += 10 * watts
            self.totals["wall_s"] += 10
            self.totals["step"] += 1
            self.totals["tokens"] += 1000
            if step == steps - 1 - lost:
                kept = dict(self.totals)
            unseen = not end and step == steps - 1  # the kill came before its line
            if not unseen:
                journal.log(self.record())
        self.parts_j.append(self.totals["energy_j"] - before_j)
        if end:
            journal.end(self.record())
        else:
            self.totals = {**kept, "energy_j": self.totals["energy_j"], "wall_s": self.totals["wall_s"]}
        self.time_s += 600  # until someone starts it again

    def finish(self) -> None:
        """Write the report of a run that reached its end: hosts and network are an estimate on top."""
        joules = self.totals["energy_j"]
        levels = tuple(
            Level(boundary=boundary, basis=basis, source="test", energy_j=energy_j)
            for boundary, basis, energy_j in (
                ("gpu", "measured", joules),
                ("node", "estimated", 1.5 * joules),
                ("fabric", "estimated", 1.6 * joules),
                ("facility", "unknown", None),
            )
        )
        energy = Energy(
            source="nvml_counter",
            boundary="gpu",
            description="test",
            total_j=joules,
            idle_w=None,
            validity="checked",
            validity_detail="test",
            cross_check=None,
            spread=None,
            levels=levels,
        )
        numbers = {"params_total": 1, "params_active": 1, "flops_per_token": 1, "loss_first": 1.0}
        losses = {"loss_last": 1.0, "heldout_loss": 1.0, "heldout_bits_per_byte": 1.0}
        report = Report(
            run="quickstart",
            commit=None,
            steps=self.totals["step"],
            tokens=self.totals["tokens"],
            **numbers,
            **losses,
            tokens_per_s=1.0,
            wall_s=self.totals["wall_s"],
            layout=Layout(tp=1, pp=1, ep=1, cp=1, dp=1),
            engine="megatron",
            device="gpu",
            energy=energy,
            tokens_per_j=self.totals["tokens"] / joules,
            campaign=Campaign(
                starts=len(self.parts_j), campaign_j=joules, useful_j=self.totals["useful_j"], goodput=0.5
            ),
        )
        write_report(self.run_dir / "report.json", report)


@pytest.fixture
def killed_twice(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path / "run")
    machine.start(20, lost=5)
    machine.start(12, lost=4, watts=650)
    machine.start(10, end=True)
    machine.finish()
    return machine


@pytest.fixture
def site(tmp_path: Path) -> str:
    path = tmp_path / "site.yaml"
    path.write_text(SITE, encoding="utf-8")
    return str(path)


def by_kind(ledger: Ledger, kind: str) -> list[Entry]:
    return [entry for entry in ledger.entries if entry.kind == kind]


def test_ledger_of_a_run_killed_and_resumed_twice_is_the_sum_of_its_parts(killed_twice, site):
    ledger = make_ledger([killed_twice.run_dir], site=site, hourly_factors=None)
    starts, (run,), (whole,) = (by_kind(ledger, kind) for kind in ("start", "run", "sum"))
    assert len(starts) == 3
    for entry, part_j in zip(starts, killed_twice.parts_j, strict=True):
        assert entry.metered_kwh == pytest.approx(part_j / 3.6e6, rel=1e-3)
    for name in ("metered_kwh", "useful_kwh", "it_kwh", "facility_kwh", "yen", "facility_co2_kg", "tokens"):
        if name != "tokens":
            assert math.fsum(getattr(one, name) for one in starts) == pytest.approx(
                getattr(run, name), rel=1e-3
            )
        assert getattr(whole, name) == pytest.approx(getattr(run, name))
    assert run.metered_kwh == pytest.approx(sum(killed_twice.parts_j) / 3.6e6, rel=1e-9)


def test_lost_work_counts_and_is_not_useful(killed_twice, site):
    run = by_kind(make_ledger([killed_twice.run_dir], site=site, hourly_factors=None), "run")[0]
    useful_j = 15 * 7000 + 8 * 6500 + 10 * 7000
    assert run.useful_kwh == pytest.approx(useful_j / 3.6e6)
    assert run.goodput == pytest.approx(useful_j / (20 * 7000 + 12 * 6500 + 10 * 7000))
    assert run.tokens == 33_000
    starts = read_run_energy(killed_twice.run_dir).starts
    assert [start.useful_j for start in starts] == pytest.approx([15 * 7000, 8 * 6500, 10 * 7000])
    assert [start.ended for start in starts] == [False, False, True]


def test_a_later_start_that_goes_back_further_takes_useful_work_back(tmp_path):
    machine = Machine(tmp_path / "run")
    machine.start(10)
    older = {key: machine.totals[key] for key in ("step", "useful_j", "tokens")}
    machine.start(10)
    machine.totals |= older  # the newest checkpoint was damaged
    machine.start(5, end=True)
    starts = read_run_energy(machine.run_dir).starts
    assert [start.useful_j for start in starts] == pytest.approx([70_000, 0, 35_000])


def test_chain_from_meter_to_yen_and_carbon(killed_twice, site):
    run = by_kind(make_ledger([killed_twice.run_dir], site=site, hourly_factors=None), "run")[0]
    assert (run.boundary, run.it_basis) == ("gpu", "estimated")
    assert run.it_kwh == pytest.approx(1.6 * run.metered_kwh)
    assert run.facility_kwh == pytest.approx(1.25 * run.it_kwh)
    assert run.yen == pytest.approx(20 * run.facility_kwh)
    assert run.facility_co2_kg == pytest.approx(0.4 * run.facility_kwh)
    assert run.metered_co2_kg == pytest.approx(0.4 * run.metered_kwh)


@pytest.mark.parametrize("place", ["tomakomai", "sakai"])
def test_what_no_source_states_is_unknown_and_so_is_what_follows(killed_twice, place):
    ledger = make_ledger([killed_twice.run_dir], site=str(SITES / f"{place}.yaml"), hourly_factors=None)
    run = by_kind(ledger, "run")[0]
    assert (run.facility_kwh, run.yen, run.facility_co2_kg) == (None, None, None)
    assert run.metered_co2_kg is None  # no source states a factor without certificates
    assert any("give --hourly-factors" in note for note in ledger.notes)
    row = list(csv.DictReader(io.StringIO(csv_text(ledger))))[-1]
    assert {row[key] for key in ("pue", "facility_kwh", "yen", "facility_co2_kg", "yen_per_kwh")} == {
        "unknown"
    }
    assert "facility unknown kWh, unknown yen, CO2 unknown kg" in as_text(ledger)
    assert html_text(ledger, today=datetime.date(2026, 11, 24)).count("不明 unknown") >= 10


def test_site_files_have_a_source_for_each_number():
    for path in SITES.glob("*.yaml"):
        figures = read_site_file(str(path)).model_dump()
        for key, figure in figures.items():
            if key not in ("name", "name_ja"):
                assert figure == "unknown" or len(figure["source"]) > 20, (path.name, key)


def test_unfinished_run_counts_what_it_spent_and_says_what_is_unknown(tmp_path, site):
    machine = Machine(tmp_path / "run")
    machine.start(20)
    ledger = make_ledger([machine.run_dir], site=site, hourly_factors=None)
    run = by_kind(ledger, "run")[0]
    assert run.metered_kwh == pytest.approx(19 * 7000 / 3.6e6)  # the last step's line was never written
    assert (run.it_kwh, run.it_basis, run.facility_kwh) == (None, "unknown", None)
    assert any("has not reached its end" in note for note in ledger.notes)


def test_a_meter_that_failed_makes_the_run_unknown(tmp_path, site):
    machine = Machine(tmp_path / "run")
    machine.start(5)
    machine.totals["energy_j"] = math.nan
    machine.start(5, end=True)
    ledger = make_ledger([machine.run_dir], site=site, hourly_factors=None)
    assert by_kind(ledger, "run")[0].metered_kwh is None
    assert by_kind(ledger, "sum")[0].metered_kwh is None
    json.dumps(as_object(ledger), allow_nan=False)


def test_a_start_that_was_checked_in_the_end_is_checked(tmp_path):
    machine = Machine(tmp_path / "run")
    for _ in range(2):
        machine.validity = "unchecked"  # as in each start's first minute
        machine.start(5)
        machine.validity = "checked"
        machine.start(5)
    lines = (machine.run_dir / "energy.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        entry["start"] = (entry["start"] + 1) // 2  # two in one: it begins unchecked, and is checked then
    path = machine.run_dir / "energy.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert read_run_energy(machine.run_dir).validity == "checked"
    entries[-1]["validity"] = "invalid"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert read_run_energy(machine.run_dir).validity == "invalid"


def test_invalid_joules_give_no_tokens_per_joule(killed_twice, tmp_path, site):
    other = Machine(tmp_path / "other")
    other.validity = "invalid"
    other.start(7, end=True)
    good = make_ledger([killed_twice.run_dir], site=site, hourly_factors=None)
    assert all(entry.tokens_per_j is not None for entry in good.entries)
    both = make_ledger([killed_twice.run_dir, other.run_dir], site=site, hourly_factors=None)
    quoted = [entry for entry in both.entries if entry.tokens_per_j is not None]
    assert {entry.validity for entry in quoted} == {"checked"}
    assert by_kind(both, "sum")[0].tokens_per_j is None
    assert by_kind(both, "sum")[0].metered_kwh is not None


def test_two_runs_are_summed_and_none_twice(killed_twice, tmp_path, site):
    other = Machine(tmp_path / "other")
    other.start(7, end=True)
    other.finish()
    ledger = make_ledger([killed_twice.run_dir, other.run_dir], site=site, hourly_factors=None)
    whole = by_kind(ledger, "sum")[0]
    assert whole.facility_kwh == pytest.approx(sum(run.facility_kwh for run in by_kind(ledger, "run")))
    with pytest.raises(InputError, match="named twice"):
        make_ledger([other.run_dir, other.run_dir / "."], site=site, hourly_factors=None)


# ---- hours ------------------------------------------------------------------------------------------------


def write_factors(path: Path, grams: Callable[[int], float], hours: int = 24) -> Path:
    start = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)
    lines = [f"{(start + datetime.timedelta(hours=h)).isoformat()},{grams(h)},0.25" for h in range(hours)]
    path.write_text("# source: made for a test\nstart,g_per_kwh,renewable_share\n" + "\n".join(lines) + "\n")
    return path


def test_energy_is_cut_at_full_hours():
    hour = int(NINE_OCLOCK_S // 3600)
    spans = [
        Span(NINE_OCLOCK_S + 1800, NINE_OCLOCK_S + 7200 + 900, 6300.0),
        Span(NINE_OCLOCK_S, NINE_OCLOCK_S, 5.0),
    ]
    assert energy_by_hour(spans) == pytest.approx({hour: 1805, hour + 1: 3600, hour + 2: 900})


def test_carbon_takes_each_hours_factor(tmp_path):
    factors = read_hourly_factors(write_factors(tmp_path / "f.csv", lambda h: 100.0 * h))
    half_and_half = Span(NINE_OCLOCK_S + 1800, NINE_OCLOCK_S + 5400, 3.6e6)
    carbon = carbon_of([half_and_half], factors)
    assert carbon.g == pytest.approx(0.5 * 900 + 0.5 * 1000)
    assert carbon.renewable_share == pytest.approx(0.25)


def test_a_start_spends_nothing_in_the_pause_after_it(killed_twice, tmp_path, site):
    factors = write_factors(tmp_path / "f.csv", lambda h: 100.0 * h)
    run = read_run_energy(killed_twice.run_dir)
    assert run.starts[0].spans[-1].end_s == NINE_OCLOCK_S + 200  # the step whose line is missing, no longer
    ledger = make_ledger([killed_twice.run_dir], site=site, hourly_factors=factors)
    assert by_kind(ledger, "run")[0].metered_co2_kg == pytest.approx(run.energy_j / 3.6e6 * 0.9)


def test_an_hour_without_a_factor_makes_carbon_unknown(killed_twice, tmp_path, site):
    factors = write_factors(tmp_path / "f.csv", lambda h: 100.0, hours=9)
    ledger = make_ledger([killed_twice.run_dir], site=site, hourly_factors=factors)
    run = by_kind(ledger, "run")[0]
    assert (run.metered_co2_kg, run.facility_co2_kg, run.grid_renewable_share) == (None, None, None)
    assert run.facility_kwh is not None
    assert any("lack 1 hours" in note for note in ledger.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("start,g_per_kwh\n2026-11-23T00:00Z,1\n", "source"),
        ("# source: x\nhour,g\n1,2\n", "header must name start and g_per_kwh"),
        ("# source: x\nstart,g_per_kwh\n2026-11-23T00:00,1\n", "no offset from UTC"),
        ("# source: x\nstart,g_per_kwh\n2026-11-23T00:30Z,1\n", "not a full hour"),
        ("# source: x\nstart,g_per_kwh\n2026-11-23T00:00Z,-1\n", "must be 0 or more"),
        ("# source: x\nstart,g_per_kwh\n2026-11-23T00:00Z,1\n2026-11-23T09:00+09:00,1\n", "there twice"),
        ("# source: x\nstart,g_per_kwh,renewable_share\n2026-11-23T00:00Z,1,30\n", "between 0 and 1"),
    ],
)
def test_broken_factors_are_refused(tmp_path, text, message):
    (tmp_path / "f.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_hourly_factors(tmp_path / "f.csv")


def test_the_page_says_which_factors_were_taken(killed_twice, tmp_path, site):
    hourly = write_factors(tmp_path / "f.csv", lambda h: 100.0)
    pages = [
        html_text(
            make_ledger([killed_twice.run_dir], site=site, hourly_factors=factors),
            today=datetime.date(2026, 11, 24),
        )
        for factors in (None, hourly)
    ]
    by_year = ("one factor of the grid for a whole year", "系統排出係数(年間値)")
    by_hour = ("factor of that hour", "その時間の系統排出係数")
    for page, said, unsaid in zip(pages, (by_year, by_hour), (by_hour, by_year), strict=True):
        assert all(text in page for text in said)
        assert not any(text in page for text in unsaid)


def test_the_sample_says_that_it_is_synthetic(killed_twice, site):
    sample = SITES / "synthetic_hourly_factors.csv"
    assert read_hourly_factors(sample).source.startswith("SYNTHETIC")
    page = html_text(
        make_ledger([killed_twice.run_dir], site=site, hourly_factors=sample),
        today=datetime.date(2026, 11, 24),
    )
    assert "SYNTHETIC" in page
    assert page.index("Energy and CO2 report") and "エネルギー・CO2報告書" in page
    assert "http" not in page and "<script" not in page and "src=" not in page  # nothing from outside


def test_page_escapes_what_others_wrote(killed_twice, tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text('name: "<b>x</b>"\npue: {value: 1.1, source: "<i>"}\n', encoding="utf-8")
    ledger = make_ledger([killed_twice.run_dir], site=str(path), hourly_factors=None)
    page = html_text(ledger, today=datetime.date(2026, 11, 24))
    assert "<b>x" not in page and "<i>" not in page
    assert "&lt;b&gt;x" in page


def test_a_folder_without_a_run_is_refused(tmp_path, site):
    with pytest.raises(InputError, match=r"has no energy\.jsonl"):
        make_ledger([tmp_path], site=site, hourly_factors=None)
