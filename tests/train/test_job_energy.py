"""Energy of a job on two machines: what is summed, and that a failure on one of them reaches all ranks."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from fake_nvml import FakeGpu, FakeNvml
from ranks_pool import RankPool

from moe.config.schema import EnergySection
from moe.metering.command_meter import CommandMeter
from moe.metering.energy import Audit, EnergyMeter
from moe.metering.gpu_meter import GpuMeter
from moe.metering.journal import EnergyJournal, read_journal, starts_of
from moe.metering.nvml import NvmlBoards
from moe.metering.report import Energy
from moe.metering.trace_file import ReplayMeter, TraceWriter
from moe.train.job_energy import JobEnergy
from moe.train.loop import Progress, energy_record


@pytest.fixture(scope="module")
def two_machines(start_ranks: Callable[..., RankPool]) -> RankPool:
    return start_ranks(2)


def open_energy(settings: EnergySection, meter: EnergyMeter | None = None) -> tuple[JobEnergy, list[str]]:
    """Open the job's energy as if each rank were alone on its machine; `meter` replaces the chosen one."""
    notes: list[str] = []
    with patch("socket.gethostname", lambda: f"machine{dist.get_rank()}"):
        if meter is None:
            return JobEnergy(settings, torch.device("cpu"), notes.append), notes
        with patch("moe.train.job_energy.choose_meter", lambda *_, **__: meter):
            return JobEnergy(settings, torch.device("cpu"), notes.append), notes


def command_of(folder: str) -> tuple[str, str]:
    return ("cat", f"{folder}/machine{dist.get_rank()}")


def measured_by_commands(folder: str) -> tuple[float, float, Energy, float, Energy, list[str]]:
    settings = EnergySection(meter="command", node_command=command_of(folder))
    energy, notes = open_energy(settings)
    start_s = time.monotonic()
    time.sleep(0.2)
    energy_j, elapsed_s = energy.read_j(), time.monotonic() - start_s
    report = energy.report(energy_j)
    dist.barrier()
    Path(folder, "machine1").unlink(missing_ok=True)
    time.sleep(1.5)
    failed_j = energy.read_j()
    failed = energy.report(failed_j)
    energy.close()
    return energy_j, elapsed_s, report, failed_j, failed, notes


def test_machines_are_summed_and_a_failed_one_leaves_the_sum_unknown(
    two_machines: RankPool, tmp_path: Path
) -> None:
    (tmp_path / "machine0").write_text("100 W")
    (tmp_path / "machine1").write_text("200 W")
    results = two_machines.run(measured_by_commands, str(tmp_path))
    for energy_j, elapsed_s, report, failed_j, failed, _ in results:
        assert energy_j == pytest.approx(300 * elapsed_s, rel=0.5)
        assert (report.source, report.boundary, report.validity) == ("command", "node", "unchecked")
        assert report.idle_w == 300
        assert [level.basis for level in report.levels] == ["measured", "unknown", "unknown"]
        assert math.isnan(failed_j)
        assert (failed.total_j, failed.validity) == (None, "invalid")
        assert "machine1" in failed.validity_detail
    assert [len(notes) for *_, notes in results] == [0, 1]


def write_trace(path: Path, *, watts: dict[str, float], counted: float, seconds: int) -> None:
    lines: list[dict[str, Any]] = [
        {"devices": list(watts), "source": "nvml_counter", "power_boundary": "gpu"}
    ]
    for tenth in range(seconds * 10 + 1):
        devices = {
            name: {"energy_j": power_w * counted * tenth / 10, "power_w": power_w}
            for name, power_w in watts.items()
        }
        lines.append({"time_s": tenth / 10, "devices": devices})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def replayed(folder: str, node: bool) -> tuple[Energy, float]:
    rank = dist.get_rank()
    meter = ReplayMeter(Path(folder, f"trace{rank}.jsonl"))
    settings = EnergySection(node_command=command_of(folder) if node else ())
    energy, _ = open_energy(settings, meter)
    energy_j = energy.read_j()
    report = energy.report(energy_j, wall_s=70.0, node_j=160_000.0 if node else None)
    energy.close()
    return report, energy_j


@pytest.mark.parametrize(("counted", "validity"), [(1.0, "checked"), (1.1, "invalid")])
def test_gpus_of_two_machines_are_spread_and_cross_checked(
    counted: float, validity: str, two_machines: RankPool, tmp_path: Path
) -> None:
    write_trace(tmp_path / "trace0.jsonl", watts={"GPU-a": 500, "GPU-b": 480}, counted=1.0, seconds=70)
    write_trace(tmp_path / "trace1.jsonl", watts={"GPU-c": 520, "GPU-d": 500}, counted=counted, seconds=70)
    for name in ("machine0", "machine1"):
        (tmp_path / name).write_text("1200 W")
    for report, energy_j in two_machines.run(replayed, str(tmp_path), True):
        assert energy_j == report.total_j == pytest.approx((980 + 1020 * counted) * 70, rel=2e-3)
        assert report.validity == validity
        assert report.cross_check is not None
        assert report.cross_check.trace_j == pytest.approx(2000 * 70)
        assert report.cross_check.window_s == pytest.approx(70)
        spread = report.spread
        assert spread is not None
        assert (spread.devices, spread.min_device, spread.max_device) == (4, "GPU-b", "GPU-c")
        assert spread.min_j == pytest.approx(480 * 70, rel=2e-3)
        gpu, node, fabric, facility = report.levels
        assert (node.basis, node.energy_j) == ("measured", 160_000)
        assert [level.basis for level in (gpu, fabric, facility)] == ["measured", "unknown", "unknown"]


def after_a_smaller_start(folder: str) -> tuple[Energy, Energy]:
    """Reports of a run on GPUs whose starts had the same size, and of one whose did not."""
    energy, _ = open_energy(EnergySection(), ReplayMeter(Path(folder, f"trace{dist.get_rank()}.jsonl")))
    energy_j = energy.read_j()
    reports = [energy.report(energy_j, wall_s=70.0, sizes=sizes) for sizes in ({(8, 2)}, {(8, 2), (4, 1)})]
    energy.close()
    return reports[0], reports[1]


def test_nothing_is_added_for_each_gpu_where_the_starts_had_different_ones(
    two_machines: RankPool, tmp_path: Path
) -> None:
    for rank in range(2):
        write_trace(tmp_path / f"trace{rank}.jsonl", watts={"GPU-a": 500}, counted=1.0, seconds=70)
    for same, varying in two_machines.run(after_a_smaller_start, str(tmp_path)):
        assert same.levels[1].basis == "estimated"
        assert [level.basis for level in varying.levels] == ["measured", "unknown", "unknown", "unknown"]
        assert "different numbers of GPUs" in varying.levels[1].source


def coarse_counters(folder: str) -> tuple[Energy, Energy]:
    """Reports of node counters that never moved: as the job's meter, and beside one of GPUs."""
    replay = ReplayMeter(Path(folder, f"trace{dist.get_rank()}.jsonl"))
    reports = []
    for settings, meter in (
        (EnergySection(meter="command", node_command=command_of(folder)), None),
        (EnergySection(node_command=command_of(folder)), replay),
    ):
        energy, _ = open_energy(settings, meter)
        reports.append(energy.report(energy.read_j()))
        energy.close()
    return reports[0], reports[1]


def test_counter_of_machines_that_never_moved_is_no_measured_zero(
    two_machines: RankPool, tmp_path: Path
) -> None:
    for rank in range(2):
        write_trace(tmp_path / f"trace{rank}.jsonl", watts={"GPU-a": 500}, counted=1.0, seconds=70)
        (tmp_path / f"machine{rank}").write_text("3600000 J")
    for alone, beside in two_machines.run(coarse_counters, str(tmp_path)):
        assert alone.validity == "invalid"
        assert "too coarse" in alone.validity_detail
        node = beside.levels[1]
        assert (node.basis, node.energy_j, "too coarse" in node.source) == ("unknown", None, True)


def one_start(folder: str, moves: int, total_j: float) -> tuple[float, Energy, Energy]:
    """A start in which the counter of this rank's machine moves so often by 1 kJ.

    Returns:
        Joules of all starts; the report that knows earlier starts from the journal, and one that does not.
    """
    counter, run_dir = Path(command_of(folder)[1]), Path(folder, f"run{dist.get_rank()}")
    run_dir.mkdir(exist_ok=True)
    first_j = float(counter.read_text().split()[0])
    meter = CommandMeter(command_of(folder), period_s=0.005)
    energy, _ = open_energy(EnergySection(), meter)
    for move in range(1, moves + 1):
        counter.with_suffix(".new").write_text(f"{first_j + 1000 * move:.0f} J")
        counter.with_suffix(".new").replace(counter)
        deadline_s = time.monotonic() + 10
        while meter.read().energy_j < 1000 * move:
            assert time.monotonic() < deadline_s, move
            time.sleep(0.002)
    total_j += energy.read_j()
    journal = EnergyJournal(run_dir)
    journal.end(energy_record(Progress(energy_j=total_j), energy))
    earlier_steps_j = starts_of(read_journal(run_dir)).steps_j[:-1]
    report, alone = energy.report(total_j, earlier_steps_j=earlier_steps_j), energy.report(total_j)
    energy.close()
    return total_j, report, alone


def test_counter_that_moved_in_an_earlier_start_alone_is_fine_enough(
    two_machines: RankPool, tmp_path: Path
) -> None:
    for rank in range(2):
        (tmp_path / f"machine{rank}").write_text("5000000 J")
    total_j = 0.0
    for moves, unsure_j in ((80, 2000), (0, 4000), (0, 6000)):
        for spent_j, report, alone in two_machines.run(one_start, str(tmp_path), moves, total_j):
            assert spent_j == 160_000
            assert report.validity == ("unchecked" if unsure_j <= 0.03 * spent_j else "invalid")
            assert ("unsure by inf J" in alone.validity_detail) == (moves == 0)
        total_j = 160_000.0
    assert "160000 J in all, unsure by 6000 J" in report.validity_detail


class FailsRightAfterItsAudit(CommandMeter):
    def audit(self) -> Audit:
        audit = super().audit()
        Path(self._argv[1]).unlink(missing_ok=True)
        self._sampler._thread.join(timeout=10)
        return audit


def failed_while_it_closed(folder: str) -> Energy:
    energy, _ = open_energy(EnergySection(), FailsRightAfterItsAudit(command_of(folder), period_s=0.005))
    report = energy.report(5e6)
    energy.close()
    return report


def test_counter_that_fails_while_the_run_closes_is_no_finer_for_it(
    two_machines: RankPool, tmp_path: Path
) -> None:
    for rank in range(2):
        (tmp_path / f"machine{rank}").write_text("5000000 J")
    for report in two_machines.run(failed_while_it_closed, str(tmp_path)):
        assert (report.validity, "unsure by inf J" in report.validity_detail) == ("invalid", True)


def mixed(folder: str) -> Energy:
    meter = None if dist.get_rank() == 0 else ReplayMeter(Path(folder, "trace1.jsonl"))
    energy, _ = open_energy(EnergySection(meter="estimate"), meter)
    report = energy.report(energy.read_j())
    energy.close()
    return report


def test_machines_that_measure_different_things_make_no_sum(two_machines: RankPool, tmp_path: Path) -> None:
    write_trace(tmp_path / "trace1.jsonl", watts={"GPU-c": 520}, counted=1.0, seconds=70)
    for report in two_machines.run(mixed, str(tmp_path)):
        assert report.source == "estimated"
        assert report.validity == "invalid"
        assert report.validity_detail == "machines measure different things: gpu, node"


def recorded(folder: str) -> tuple[float, float, list[str], list[str]]:
    nvml = FakeNvml({"GPU-aaaa": FakeGpu(power_w=300)}, time.monotonic)

    def choose(*_: object, record: TraceWriter, **__: object) -> GpuMeter:
        return GpuMeter(NvmlBoards(nvml, ["GPU-aaaa"]), record=record)

    settings, on_gpu, on_cpu = EnergySection(record=True, meter="estimate"), list[str](), list[str]()
    with patch("moe.train.job_energy.choose_meter", choose):
        energy = JobEnergy(settings, torch.device("cpu"), on_gpu.append, run_dir=Path(folder))
    time.sleep(0.5)
    energy_j = energy.read_j()
    energy.close()
    (path,) = Path(folder, "energy_trace").iterdir()
    JobEnergy(settings, torch.device("cpu"), on_cpu.append, run_dir=Path(folder)).close()
    return energy_j, ReplayMeter(path).read().energy_j, on_gpu, on_cpu


def test_samples_are_kept_where_there_are_any_and_the_lack_is_told(
    two_machines: RankPool, tmp_path: Path
) -> None:
    ((energy_j, replayed_j, on_gpu, on_cpu),) = two_machines.run(recorded, str(tmp_path), num_ranks=1)
    assert energy_j == pytest.approx(150, rel=0.9)
    assert replayed_j == pytest.approx(energy_j, abs=300 * 0.3)
    assert on_gpu == []
    assert on_cpu == ["energy.record: this meter has no samples to record; a GPU meter has"]
