"""metrics.jsonl, report.json and the pictures drawn from them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe.errors import InputError
from moe.metering.jsonl import EXPERT_LOAD_FILE, METRICS_FILE, StepLog, read_step_log
from moe.metering.plots import plot_run
from moe.metering.report import Report, read_report, write_report
from moe.metering.sinks import JsonlSink

MakeReport = Callable[..., Report]
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def write_run(run_dir: Path, *, steps: int = 30, with_load: bool = True, with_energy: bool = True) -> None:
    metrics, load = StepLog(run_dir / METRICS_FILE), StepLog(run_dir / EXPERT_LOAD_FILE)
    for step in range(1, steps + 1):
        record: dict[str, Any] = {"step": step, "loss": 8.0 / step, "tokens": 64 * step, "energy_j": None}
        if with_energy:
            record |= {"energy_j": 15.0 * step, "power_w": 30.0}
        if step % 10 == 0:
            record |= {"heldout_loss": 8.1 / step, "heldout_bits_per_byte": 3.0 / step}
        metrics.write(record)
        if with_load:
            load.write({"step": step, "counts": [[step, 0, 2, 3], [0, 0, 0, 0]]})
    metrics.close()
    load.close()


def test_log_resumes_with_one_record_a_step(tmp_path: Path) -> None:
    write_run(tmp_path, steps=9)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 10, "lo')
    sink = JsonlSink(tmp_path, resume_step=6)
    assert sink.last is not None
    assert (sink.last["step"], sink.last["energy_j"]) == (6, 90.0)
    sink.start({}, 8)
    for step in (7, 8):
        sink.log({"step": step, "loss": 1.0})
    sink.finish(None)
    assert [record["step"] for record in read_step_log(tmp_path / METRICS_FILE)] == list(range(1, 9))


def test_log_starts_afresh_without_resume(tmp_path: Path) -> None:
    write_run(tmp_path, steps=3)
    assert JsonlSink(tmp_path).last is None
    assert read_step_log(tmp_path / METRICS_FILE) == []


def test_log_is_on_disk_after_every_step_and_is_strict_json(tmp_path: Path) -> None:
    log = StepLog(tmp_path / METRICS_FILE)
    log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    line = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(line) == {"step": 1, "loss": None, "grad_norm": None}


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1}'])
def test_log_names_the_broken_line(tmp_path: Path, line: str) -> None:
    (tmp_path / METRICS_FILE).write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2"):
        JsonlSink(tmp_path, resume_step=3)


def test_report_round_trip_has_the_fixed_fields(tmp_path: Path, make_report: MakeReport) -> None:
    report = make_report()
    write_report(tmp_path / "report.json", report)
    assert read_report(tmp_path / "report.json") == report
    raw = json.loads((tmp_path / "report.json").read_text())
    fixed = (
        "run commit steps tokens params_total params_active flops_per_token loss_first loss_last "
        "heldout_loss heldout_bits_per_byte tokens_per_s wall_s layout engine device energy tokens_per_j "
        "campaign"
    )
    assert list(raw) == ["schema_version", *fixed.split()]
    assert list(raw["layout"]) == ["tp", "pp", "ep", "cp", "dp", "etp"]
    energy = "source boundary description total_j idle_w validity validity_detail cross_check spread levels"
    assert list(raw["energy"]) == energy.split()
    assert list(raw["campaign"]) == ["starts", "campaign_j", "useful_j", "goodput"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_report_writes_a_diverged_loss_as_null(tmp_path: Path, make_report: MakeReport) -> None:
    write_report(tmp_path / "report.json", make_report(loss_last=math.nan))
    assert json.loads((tmp_path / "report.json").read_text())["loss_last"] is None
    assert read_report(tmp_path / "report.json").loss_last is None


def test_report_refuses_unknown_source_and_field(make_report: MakeReport) -> None:
    with pytest.raises(ValueError, match="source"):
        make_report(energy={"source": "guess"})
    with pytest.raises(ValueError, match="speed"):
        make_report(speed=1)


def test_report_missing_or_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(InputError, match=r"report\.json does not exist"):
        read_report(path)
    path.write_text('{"run": 1}')
    with pytest.raises(InputError, match=r"report\.json is not a report of this version: run"):
        read_report(path)


def test_plot_run_draws_every_picture(tmp_path: Path, make_report: MakeReport) -> None:
    write_run(tmp_path)
    write_report(tmp_path / "report.json", make_report())
    paths = plot_run(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "plots/loss.png",
        "plots/expert_load.png",
        "plots/power.png",
    ]
    assert all(path.read_bytes().startswith(PNG_MAGIC) for path in paths)
    assert len(list((tmp_path / "plots").iterdir())) == 3


def test_plot_run_leaves_out_what_was_not_recorded(tmp_path: Path) -> None:
    write_run(tmp_path, steps=1, with_load=False, with_energy=False)
    assert [path.name for path in plot_run(tmp_path)] == ["loss.png"]


def test_power_plot_says_when_energy_is_an_estimate() -> None:
    from moe.metering.plots import _energy_label

    assert _energy_label({}) == "source unknown"
    record = {"energy_source": "estimated", "energy_boundary": "node", "energy_validity": "unchecked"}
    assert _energy_label(record) == "ESTIMATED from a power model, boundary: node"
    record = {"energy_source": "nvml_counter", "energy_boundary": "gpu", "energy_validity": "invalid"}
    assert _energy_label(record) == "measured (nvml_counter, invalid), boundary: gpu"


def test_power_plot_time_is_energy_over_power() -> None:
    from moe.metering.plots import _elapsed_s

    records = [
        {"step": 1, "energy_j": 10.0, "power_w": 20.0},
        {"step": 2, "energy_j": 40.0, "power_w": 10.0},
        {"step": 3, "energy_j": None, "power_w": None},
    ]
    assert _elapsed_s(records).tolist() == [0.5, 3.5, 3.5]


@pytest.mark.parametrize("text", [None, "", '{"step": 1, "loss": null}\n', '{"step": 1, "lo'])
def test_plot_run_without_usable_metrics_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / METRICS_FILE).write_text(text)
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        plot_run(tmp_path)
    assert not (tmp_path / "plots").exists()
