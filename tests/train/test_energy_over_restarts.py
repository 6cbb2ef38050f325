"""Joules of a run over its starts: nothing that was metered is lost, and what was lost work is told apart.

The fast tests drive the real loop, folder, journal and sinks with an engine whose every step costs 10 J; the
slow one kills real training processes.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from train_runs import TINY, command, environment, metrics, run, train_command, wait_for_step

from moe.config import load_config
from moe.config.schema import RunConfig
from moe.engine.base import EvalResult, Layout, StepResult
from moe.metering.energy import Audit, EnergyMeterError, EnergyReading
from moe.metering.journal import EnergyJournal, read_journal, starts_of
from moe.metering.report import Report, read_report, write_report
from moe.train.folder import REPORT_FILE, log_start, spent_before
from moe.train.job_energy import JobEnergy
from moe.train.loop import Loop, Progress, energy_record, progress_from
from moe.train.run import Outputs, make_report
from moe.train.stop import StopRequest

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
STEP_J, EVAL_J, SAVE_J = 10.0, 3.0, 5.0


class Killed(Exception):
    """The process is gone; nothing after it runs."""


class Meter:
    """A meter whose joules the test spends."""

    def __init__(self, source: str = "rapl", boundary: str = "cpu_package") -> None:
        self.source, self.boundary = source, boundary
        self.description, self.idle_w, self.devices = "a meter of this test", None, ("package-0",)
        self.spent_j = 0.0
        self.validity = "unchecked"
        self.fails = False

    def read(self) -> EnergyReading:
        if self.fails:
            raise EnergyMeterError("the counter is gone")
        return EnergyReading(time_s=0.0, energy_j=self.spent_j, device_j=(self.spent_j,))

    def audit(self) -> Audit:
        return Audit(validity=self.validity, detail="counter 1 J, trace 2 J")  # type: ignore[arg-type]

    def close(self) -> None:
        pass


class Engine:
    """Steps that cost joules and, at one of them, the process."""

    rank = dp_rank = 0
    world_size = 1
    params_total = 1
    device = "cpu"
    torch_device = torch.device("cpu")
    layout = Layout(tp=1, pp=1, ep=1, cp=1, dp=1)

    def __init__(self, meter: Meter, killed_in_step: int | None) -> None:
        self.meter = meter
        self.steps_left = math.inf if killed_in_step is None else killed_in_step - 1

    def train_step(self, batches: object, lr: float) -> StepResult:
        if self.steps_left == 0:
            raise Killed
        self.steps_left -= 1
        self.meter.spent_j += STEP_J
        counts_LE = torch.ones(1, 8, dtype=torch.int64)
        return StepResult(loss=1.0, balance_loss=0.0, z_loss=0.0, grad_norm=1.0, counts_LE=counts_LE)

    def evaluate(self, *arguments: object) -> EvalResult:
        self.meter.spent_j += EVAL_J
        return EvalResult(nll_nats=1.0, tokens=1, text_bytes=1)


class SavingLoop(Loop):
    """Writes the progress alone as a checkpoint."""

    def _save(self) -> None:
        self._read_energy()
        values = {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in vars(self.progress).items()
        }
        (self.run_dir / "saved.json").write_text(json.dumps({"progress": values}))
        self.engine.meter.spent_j += SAVE_J  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def config() -> RunConfig:
    overrides = [*TINY, "train.steps=12", "checkpoint.interval=4", "train.eval_interval=6"]
    return load_config(QUICKSTART, overrides, world_size=1)


def start(
    config: RunConfig, run_dir: Path, meter: Meter, monkeypatch: pytest.MonkeyPatch, *, killed_in: int | None
) -> Report | None:
    """One start of the run, as run.py makes it, killed in one of its own steps or going to the end."""
    monkeypatch.setattr("moe.train.job_energy.choose_meter", lambda *_, **__: meter)
    run_dir.mkdir(exist_ok=True)
    saved = run_dir / "saved.json"
    progress = progress_from(json.loads(saved.read_text())) if saved.exists() else Progress()
    progress.charge(spent_before(run_dir))
    engine: Any = Engine(meter, killed_in)
    outputs = Outputs(lambda text: None)
    energy = JobEnergy(config.energy, engine.torch_device, outputs.say)
    outputs.open(config, run_dir, energy=energy, progress=progress, world_size=1, tokenizer="t")
    loop = SavingLoop(
        config,
        run_dir,
        engine,
        datasets=(SimpleNamespace(), SimpleNamespace()),  # type: ignore[arg-type]
        token_bytes_V=torch.zeros(1),
        energy=energy,
        sinks=outputs.sinks,
        loads=outputs.loads,
        progress=progress,
        stop=StopRequest(),
    )
    try:
        loop.run()
    except Killed:
        return None
    outputs.close_journal(energy_record(progress, energy))
    starts = starts_of(read_journal(run_dir))
    outputs.report = make_report(config, engine, energy, progress=progress, starts=starts)
    outputs.close()
    write_report(run_dir / REPORT_FILE, outputs.report)
    return outputs.report


def parts_j(entries: list[dict[str, Any]]) -> list[float]:
    """Joules of each start by the journal: up to where the next one begins."""
    begins = [entry["energy_j"] for entry in entries if entry["event"] == "start"]
    ends = [*begins[1:], entries[-1]["energy_j"]]
    return [end - begin for begin, end in zip(begins, ends, strict=True)]


def test_run_killed_and_resumed_twice_is_the_sum_of_its_parts(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, meters = tmp_path / "run", [Meter(), Meter(), Meter()]
    assert start(config, run_dir, meters[0], monkeypatch, killed_in=8) is None  # did 7, kept 4
    assert start(config, run_dir, meters[1], monkeypatch, killed_in=6) is None  # did 5 to 9, kept 8
    report = start(config, run_dir, meters[2], monkeypatch, killed_in=None)  # did 9 to 12
    assert report is not None

    spent_j = [meter.spent_j for meter in meters]
    assert spent_j == [
        7 * STEP_J + SAVE_J + EVAL_J,
        5 * STEP_J + SAVE_J + EVAL_J,
        4 * STEP_J + SAVE_J + EVAL_J,
    ]
    entries = read_journal(run_dir)
    assert parts_j(entries) == pytest.approx(spent_j, rel=1e-3)
    campaign = report.campaign
    assert campaign.starts == 3
    assert campaign.campaign_j == pytest.approx(sum(spent_j), rel=1e-3) == report.energy.total_j
    assert campaign.useful_j == 12 * STEP_J
    assert campaign.goodput == pytest.approx(12 * STEP_J / sum(spent_j))
    assert report.tokens_per_j == pytest.approx(report.tokens / sum(spent_j))
    assert read_report(run_dir / REPORT_FILE) == report

    records = metrics(run_dir)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[-1]["useful_j"] == 12 * STEP_J
    assert {record["energy_source"] for record in records} == {"rapl"}
    joules = [entry["energy_j"] for entry in entries]
    assert joules == sorted(joules)
    times_s = [entry["time_s"] for entry in entries]
    assert times_s == sorted(times_s)


def test_joules_after_the_last_line_that_a_kill_took_are_at_most_a_step(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, killed = tmp_path / "run", Meter()
    start(config, run_dir, killed, monkeypatch, killed_in=5)  # just after a checkpoint, which no line has yet
    report = start(config, run_dir, Meter(), monkeypatch, killed_in=None)
    assert report is not None
    true_j = killed.spent_j + 8 * STEP_J + 2 * SAVE_J + 2 * EVAL_J
    assert 0 <= true_j - (report.campaign.campaign_j or 0) <= SAVE_J


def test_run_that_dies_before_its_first_checkpoint_has_no_useful_joules_from_it(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, first, second = tmp_path / "run", Meter(), Meter()
    start(config, run_dir, first, monkeypatch, killed_in=3)
    report = start(config, run_dir, second, monkeypatch, killed_in=None)
    assert report is not None
    assert report.campaign.campaign_j == first.spent_j + second.spent_j
    assert report.campaign.useful_j == 12 * STEP_J


def test_meter_that_failed_in_an_earlier_start_leaves_the_campaign_unknown(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, failing = tmp_path / "run", Meter()
    start(config, run_dir, failing, monkeypatch, killed_in=6)
    failing.fails = True
    start(config, run_dir, failing, monkeypatch, killed_in=3)
    report = start(config, run_dir, Meter(), monkeypatch, killed_in=None)
    assert report is not None
    assert (report.energy.validity, report.energy.total_j, report.tokens_per_j) == ("invalid", None, None)
    assert (report.campaign.campaign_j, report.campaign.goodput) == (None, None)
    assert metrics(run_dir)[-1]["energy_j"] is None
    assert metrics(run_dir)[-1]["energy_validity"] == "invalid"


def test_machines_whose_instrument_failed_in_an_earlier_start_stay_unknown(tmp_path: Path) -> None:
    labels = {"energy_source": "rapl", "energy_boundary": "node", "energy_validity": "unchecked"}
    lines: list[dict[str, Any]] = [
        labels | {"step": step, "energy_j": joules, "wall_s": joules}
        for step, joules in enumerate((0.0, 5.0))
    ]
    log_start(tmp_path, step=0, energy_j=0.0, wall_s=0.0, world_size=1, tokenizer="t")
    journal = EnergyJournal(tmp_path)
    journal.open(lines[0] | {"node_j": 0.0})
    journal.end(lines[1] | {"node_j": 8.0})
    assert spent_before(tmp_path).node_j == 8
    EnergyJournal(tmp_path).end(lines[1] | {"node_j": math.nan})
    spent = spent_before(tmp_path)
    assert math.isnan(spent.node_j)
    assert (spent.energy_j, spent.wall_s) == (5, 5)


def test_start_on_another_number_of_gpus_is_told_in_the_report(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    start(config, run_dir, Meter("nvml_counter", "gpu"), monkeypatch, killed_in=6)
    journal = run_dir / "energy.jsonl"
    assert (entry := read_journal(run_dir)[0])["gpus"] == 0
    journal.write_text(journal.read_text().replace('"gpus": 0', '"gpus": 8'))
    report = start(config, run_dir, Meter("nvml_counter", "gpu"), monkeypatch, killed_in=None)
    assert report is not None
    assert (entry["machines"], report.energy.levels[1].basis) == (1, "unknown")
    assert "different numbers of GPUs" in report.energy.levels[1].source


def test_instruments_that_disagree_flag_every_output(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter()
    meter.validity = "invalid"
    report = start(config, tmp_path / "run", meter, monkeypatch, killed_in=None)
    assert report is not None
    assert (report.energy.validity, report.tokens_per_j) == ("invalid", None)
    assert report.energy.validity_detail == "counter 1 J, trace 2 J"
    assert report.energy.total_j == meter.spent_j
    assert {record["energy_validity"] for record in metrics(tmp_path / "run")} == {"invalid"}
    assert {record["tokens_per_j"] for record in metrics(tmp_path / "run")} == {None}


@pytest.mark.parametrize(
    ("second", "words"),
    [(Meter("estimated", "node"), "measured different things"), (Meter(), "energy of start 1 was invalid")],
    ids=["another boundary", "an invalid start"],
)
def test_starts_that_do_not_add_up_are_flagged(
    second: Meter, words: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Meter()
    first.validity = "unchecked" if second.source == "estimated" else "invalid"
    start(config, tmp_path / "run", first, monkeypatch, killed_in=7)
    report = start(config, tmp_path / "run", second, monkeypatch, killed_in=None)
    assert report is not None
    assert report.energy.validity == "invalid"
    assert words in report.energy.validity_detail


@pytest.mark.slow
def test_real_run_killed_and_resumed_twice_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = ("train.steps=30", "checkpoint.interval=8")
    argv, last_j = train_command(run_dir, *overrides), []
    for killed_at in (12, 20):
        process = subprocess.Popen(
            argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wait_for_step(run_dir, killed_at, process)
        process.kill()
        process.communicate()
        last_j.append(metrics(run_dir)[-1]["energy_j"])
        argv = command("resume", str(run_dir))
    run(argv)
    report = json.loads((run_dir / "report.json").read_text())
    entries = read_journal(run_dir)
    begins = [entry["energy_j"] for entry in entries if entry["event"] == "start"]
    assert begins == pytest.approx([0.0, *last_j], rel=1e-3)
    assert sum(parts_j(entries)) == pytest.approx(report["campaign"]["campaign_j"], rel=1e-3)
    assert report["campaign"]["starts"] == 3
    assert 0 < report["campaign"]["goodput"] < 1
