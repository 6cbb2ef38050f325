"""RAPL on a folder laid out like powercap; the estimate on real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe.errors import InputError
from moe.metering.choose import choose_meter
from moe.metering.energy import EnergyMeterError
from moe.metering.estimate import EstimatedMeter, PowerModel, server_power_model
from moe.metering.rapl import RaplMeter

RANGE_UJ = 65_532_610_987
MODEL = PowerModel(idle_w=4.0, active_w_per_core=10.0, provenance="this test")


def add_zone(root: Path, zone: str, name: str, energy_uj: int) -> Path:
    folder = root / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    return folder / "energy_uj"


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, one with memory, and the zones that overlap them."""
    add_zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    add_zone(tmp_path, "intel-rapl:0:0", "core", 400_000)
    add_zone(tmp_path, "intel-rapl:0:1", "dram", 2_000_000)
    add_zone(tmp_path, "intel-rapl:1", "package-1", 0)
    add_zone(tmp_path, "intel-rapl:2", "psys", 9_000_000)
    add_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)
    return tmp_path


def set_uj(root: Path, zone: str, energy_uj: int) -> None:
    (root / zone / "energy_uj").write_text(str(energy_uj))


def test_rapl_sums_packages_and_memory_once(powercap: Path) -> None:
    meter = RaplMeter(powercap)
    for zone in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        set_uj(powercap, zone, 60_000_000)
    set_uj(powercap, "intel-rapl:0", 1_000_000 + 5_000_000)
    set_uj(powercap, "intel-rapl:0:1", 2_000_000 + 1_500_000)
    set_uj(powercap, "intel-rapl:1", 250_000)
    reading = meter.read()
    assert reading.energy_j == pytest.approx(6.75)
    assert meter.devices == ("intel-rapl:0", "intel-rapl:0:1", "intel-rapl:1")
    assert reading.device_j == pytest.approx((5.0, 1.5, 0.25))
    assert meter.audit().validity == "unchecked"
    assert (meter.source, meter.boundary, meter.idle_w) == ("rapl", "cpu_package_dram", None)
    meter.close()


def test_rapl_without_memory_says_so(tmp_path: Path) -> None:
    add_zone(tmp_path, "intel-rapl:0", "package-0", 7)
    meter = RaplMeter(tmp_path)
    meter.close()
    assert meter.boundary == "cpu_package"


def test_rapl_counter_wraps_without_losing_joules(tmp_path: Path) -> None:
    add_zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 3_000_000)
    meter = RaplMeter(tmp_path)
    set_uj(tmp_path, "intel-rapl:0", 1_000_000)
    assert meter.read().energy_j == pytest.approx(4.0)
    set_uj(tmp_path, "intel-rapl:0", 2_000_000)
    assert meter.read().energy_j == pytest.approx(5.0)
    meter.close()


def test_rapl_counter_standing_still_or_gone_raises(tmp_path: Path) -> None:
    add_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    now_s = [10.0]
    meter = RaplMeter(tmp_path, clock=lambda: now_s[0])
    now_s[0] += 3.0
    with pytest.raises(EnergyMeterError, match=r"intel-rapl:0.*stands at 5 uJ since 3\.0 s"):
        meter.read()
    meter.close()
    meter = RaplMeter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    with pytest.raises(EnergyMeterError, match="energy_uj cannot be read"):
        meter.read()
    assert meter.audit().validity == "invalid"
    meter.close()


def test_rapl_refuses_missing_and_unreadable_counters(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no RAPL package counter.*estimate"):
        RaplMeter(tmp_path)
    add_zone(tmp_path, "intel-rapl:0", "package-0", 5).write_text("")
    with pytest.raises(InputError, match=r"intel-rapl:0.*cannot be read.*chmod"):
        RaplMeter(tmp_path)


def burn(cpu_s: float) -> None:
    until_s = time.process_time() + cpu_s
    while time.process_time() < until_s:
        pass


def test_estimate_follows_real_cpu_seconds() -> None:
    start_wall_s, start_cpu_s = time.monotonic(), time.process_time()
    meter = EstimatedMeter(MODEL, [os.getpid()])
    burn(0.3)
    first = meter.read()
    time.sleep(0.2)
    second = meter.read()
    wall_s, cpu_s = time.monotonic() - start_wall_s, time.process_time() - start_cpu_s
    # psutil counts in ticks of 10 ms: one at each end.
    assert second.energy_j == pytest.approx(4.0 * wall_s + 10.0 * cpu_s, abs=10.0 * 0.03)
    # Asleep, only the idle power goes on.
    assert (second.energy_j - first.energy_j) / (second.time_s - first.time_s) == pytest.approx(4.0, abs=1.0)
    assert first.energy_j > 3.0


def test_estimate_keeps_the_joules_of_a_process_that_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time\nwhile time.process_time() < 60: pass"])
    meter = EstimatedMeter(MODEL, [child.pid, 2**22 + 1])
    opened_s = meter.read().time_s
    time.sleep(0.4)
    alive = meter.read()
    child.kill()
    child.wait()
    ended = meter.read()
    busy_j = alive.energy_j - 4.0 * (alive.time_s - opened_s)
    assert busy_j > 0.5
    assert ended.energy_j == pytest.approx(alive.energy_j + 4.0 * (ended.time_s - alive.time_s), abs=0.1)


def test_estimate_states_every_constant() -> None:
    model = PowerModel(idle_w=4.5, active_w_per_core=2.25, gpu_w=700, provenance="data sheet")
    meter = EstimatedMeter(model, [os.getpid()])
    assert (meter.source, meter.boundary, meter.idle_w) == ("estimated", "node", 4.5)
    for fact in ("estimated, not measured", "4.5 W idle", "2.25 W", "700 W of GPUs", "data sheet"):
        assert fact in meter.description


def test_server_model_spans_idle_to_full_load() -> None:
    model = server_power_model(8)
    assert model.idle_w == pytest.approx(8 * 0.74)
    assert model.idle_w + 8 * model.active_w_per_core == pytest.approx(8 * 3.5)
    assert "Cloud Carbon Footprint" in model.provenance
    assert (
        "1 W idle and 4 W busy, as configured"
        in server_power_model(8, idle_w_per_cpu=1, full_w_per_cpu=4).provenance
    )


class DeadNvml:
    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:
        raise self.NVMLError("Driver Not Loaded")


def choose(kind: str, root: Path, **changes: object) -> Callable[[], object]:
    arguments = {
        "gpu_uuids": [],
        "pids": [os.getpid()],
        "power_model": MODEL,
        "powercap_root": root,
    } | changes
    return lambda: choose_meter(kind, **arguments)  # type: ignore[arg-type]


def test_auto_prefers_a_real_counter(powercap: Path) -> None:
    meter = choose("auto", powercap)()
    assert meter.source == "rapl"  # type: ignore[attr-defined]
    meter.close()  # type: ignore[attr-defined]


def test_auto_estimates_where_nothing_measures_and_says_why(tmp_path: Path) -> None:
    meter = choose("auto", tmp_path)()
    assert meter.source == "estimated"  # type: ignore[attr-defined]
    assert "not measured because there is no RAPL" in meter.description  # type: ignore[attr-defined]


def test_auto_never_leaves_out_gpus(powercap: Path) -> None:
    gpus = {"gpu_uuids": ["GPU-a"], "nvml": DeadNvml()}
    with pytest.raises(InputError, match=r"Driver Not Loaded.*gpu_w"):
        choose("auto", powercap, **gpus)()
    with_gpu = PowerModel(idle_w=1, active_w_per_core=1, gpu_w=700, provenance="limit")
    meter = choose("auto", powercap, **gpus, power_model=with_gpu)()
    assert meter.source == "estimated"  # type: ignore[attr-defined]
    assert "Driver Not Loaded" in meter.description  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nvml", "at least one GPU"),
        ("amd", "amdsmi"),
        ("rapl", "no RAPL"),
        ("command", r"energy\.node_command"),
        ("watts", "'watts'.*auto, nvml, amd, rapl, command, estimate"),
    ],
)
def test_named_meter_that_cannot_run_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose(kind, tmp_path)()
