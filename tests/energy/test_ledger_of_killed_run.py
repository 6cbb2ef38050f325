"""The ledger of a real run that was killed and resumed twice."""

from __future__ import annotations

import json
import math
import signal
import subprocess
from pathlib import Path

import pytest
from train_runs import command, environment, metrics, run, train_command, wait_for_step

RECIPE = ("train.steps=40", "checkpoint.interval=3", "energy.meter=estimate")


def start_and_kill(argv: list[str], run_dir: Path, *, at_step: int) -> float:
    """Joules of the run as its last line says them before SIGKILL."""
    process = subprocess.Popen(
        argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for_step(run_dir, at_step, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return float(metrics(run_dir)[-1]["energy_j"])


@pytest.mark.slow
def test_ledger_equals_the_sum_of_its_parts(tmp_path: Path):
    run_dir = tmp_path / "run"
    after_first_j = start_and_kill(train_command(run_dir, *RECIPE), run_dir, at_step=8)
    after_second_j = start_and_kill(command("resume", str(run_dir)), run_dir, at_step=14)
    run(command("resume", str(run_dir), "train.steps=20"))
    report = json.loads((run_dir / "report.json").read_text())
    total_j = report["energy"]["total_j"]
    parts_j = [after_first_j, after_second_j - after_first_j, total_j - after_second_j]

    text = run(command("energy", "report", str(run_dir), "--site", "sakai", "--json"))
    entries = json.loads(text[text.index("{") : text.rindex("}") + 1])["entries"]
    starts = [entry for entry in entries if entry["kind"] == "start"]
    (whole,) = (entry for entry in entries if entry["kind"] == "run")
    assert len(starts) == 3
    for entry, part_j in zip(starts, parts_j, strict=True):
        assert entry["metered_kwh"] * 3.6e6 == pytest.approx(part_j, rel=1e-3)
    assert whole["metered_kwh"] * 3.6e6 == pytest.approx(total_j, rel=1e-3)
    assert math.fsum(entry["metered_kwh"] for entry in starts) == pytest.approx(
        whole["metered_kwh"], rel=1e-3
    )
    assert whole["goodput"] == pytest.approx(report["campaign"]["goodput"], rel=1e-3)
    assert math.fsum(entry["useful_kwh"] for entry in starts) == pytest.approx(whole["useful_kwh"], rel=1e-3)
    assert whole["goodput"] < 1  # killed between two checkpoints
    assert {whole["pue"], whole["yen"], whole["facility_kwh"]} == {"unknown"}
