"""The sweep on GPUs that obey a law, whose optimum is known."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from simulated_gpus import MOST_MHZ, SimulatedGpu, simulated_nvml

from moe.config import load_config
from moe.energy import sweep as sweep_module
from moe.energy import training_leg
from moe.energy.grid import AS_FOUND, Setting, parse_grid, parse_share
from moe.energy.power_control import PowerControl
from moe.energy.steady_state import Rule
from moe.energy.sweep import SweepWatch, _control_of, best_point, sweep
from moe.energy.watch import Machines
from moe.errors import InputError
from moe.metering.energy import EnergyMeterError

TOKENS = 4096
RULE = Rule("test", 1.0, 5, 30.0, 0.5, 0.02, 5.0, 50, 1.0)
CAPS = parse_grid("250:650:50", "power_cap_w")
CLOCKS = parse_grid("990:1890:90", "clock_mhz")


def train(watch: SweepWatch, gpu: SimulatedGpu, *, warming: float = 0.0) -> None:
    """Steps of a training on the GPU, whose leakage grows by a share a second, until the watch is done."""
    time_s, energy_j, step = 0.0, 0.0, 0
    while not watch.done:
        step += 1
        watts = gpu.power_w * (1 + warming * time_s)
        time_s += gpu.step_s
        energy_j += watts * gpu.step_s
        watch.log(
            {"step": step, "wall_s": time_s, "energy_j": energy_j, "tokens": step * TOKENS, "loss": 1.0}
        )
        assert step < 100_000


def efficiency(setting: Setting) -> tuple[float, float]:
    """Tokens a second and a joule by the law itself."""
    gpu = SimulatedGpu("GPU-a")
    gpu.limit_w = setting.power_cap_w or gpu.limit_w
    gpu.lock_mhz = setting.clock_mhz
    return TOKENS / gpu.step_s, TOKENS / (gpu.step_s * gpu.power_w)


def exact_best(grid: Sequence[Setting], max_slowdown: float) -> Setting:
    least = (1 - max_slowdown) * efficiency(AS_FOUND)[0]
    return max(
        (one for one in [AS_FOUND, *grid] if efficiency(one)[0] >= least), key=lambda one: efficiency(one)[1]
    )


def swept(grid: Sequence[Setting], *, warming: float = 0.0) -> SweepWatch:
    gpu = SimulatedGpu("GPU-a")
    with PowerControl(simulated_nvml([gpu]), ["GPU-a"], allowed=True) as control:
        watch = SweepWatch(control, grid, rule=RULE, note=lambda _: None)
        train(watch, gpu, warming=warming)
    assert (gpu.limit_w, gpu.lock_mhz) == (700.0, None)
    return watch


@pytest.mark.parametrize("grid", [CAPS, CLOCKS], ids=["caps", "clocks"])
@pytest.mark.parametrize("max_slowdown", [0.0, 0.03, 0.1, 0.5])
def test_best_setting_is_that_of_the_law(grid, max_slowdown):
    points = swept(grid).points
    assert [point.setting for point in points] == [AS_FOUND, *grid]
    for point in points:
        assert (point.tokens_per_s, point.tokens_per_j) == pytest.approx(efficiency(point.setting))
    assert best_point(points, max_slowdown).setting == exact_best(grid, max_slowdown)


def test_the_allowed_slowdown_binds():
    assert exact_best(CLOCKS, 0.0) == AS_FOUND
    assert exact_best(CLOCKS, 0.5).clock_mhz < exact_best(CLOCKS, 0.05).clock_mhz < MOST_MHZ


def test_a_machine_that_warms_up_favours_no_setting():
    points = swept(CAPS, warming=1e-4).points
    ratios = [point.tokens_per_j / efficiency(point.setting)[1] for point in points]
    assert max(ratios) / min(ratios) < 1.003
    assert best_point(points, 0.5).setting == exact_best(CAPS, 0.5)


def test_a_meter_that_fails_ends_the_sweep_and_settings_go_back():
    gpu = SimulatedGpu("GPU-a")

    def fail() -> None:
        with PowerControl(simulated_nvml([gpu]), ["GPU-a"], allowed=True) as control:
            watch = SweepWatch(control, CAPS, rule=RULE, note=lambda _: None)
            for step in range(1, 10_000):
                broken = gpu.limit_w < 700
                energy_j = None if broken else 70.0 * step
                watch.log(
                    {"step": step, "wall_s": 0.1 * step, "energy_j": energy_j, "tokens": step, "loss": 1.0}
                )

    with pytest.raises(EnergyMeterError, match="no joules at 250 W"):
        fail()
    assert gpu.limit_w == 700.0


def test_a_cpu_and_several_machines_are_refused():
    for machines, message in (
        (Machines(("one",), (), ()), "this job runs on none"),
        (Machines(("one", "two"), ("GPU-a", "GPU-b"), ("GPU-a",)), "this job has 2"),
    ):
        with pytest.raises(InputError, match=message), _control_of(machines, allowed=True):
            pass


def test_the_first_change_says_once_how_to_undo_it():
    gpu, notes = SimulatedGpu("GPU-a"), []
    with PowerControl(simulated_nvml([gpu]), ["GPU-a"], allowed=True) as control:
        train(SweepWatch(control, CAPS, rule=RULE, note=notes.append), gpu)
    undo = [i for i, text in enumerate(notes) if "nvidia-smi -i GPU-a -pl 700" in text]
    assert undo == [1]  # after the window as found, before any under a cap


class Job:
    """A job on one simulated GPU: the engine notes the power limit that it closes under."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, validity: str, fails: bool) -> None:
        self.gpu = SimulatedGpu("GPU-a")
        self.closed_at_w: list[float] = []
        self.fails = fails
        self.energy = SimpleNamespace(
            source="nvml_counter", boundary="gpu", validity=validity, validity_detail="5 % apart"
        )
        nvml = simulated_nvml([self.gpu])
        monkeypatch.setattr(sweep_module, "open_nvml", lambda: contextlib.nullcontext(nvml))
        monkeypatch.setattr(training_leg, "make_engine", lambda _: self)
        monkeypatch.setattr(training_leg, "_train", self.train)

    def train(self, _engine, _config, make_watch, _note):
        watch = make_watch(Machines(("one",), ("GPU-a",), ("GPU-a",)))
        train(watch, self.gpu)
        if self.fails:
            watch._control.set_power_limit(400)
            raise EnergyMeterError("broken")
        return SimpleNamespace(energy=self.energy)

    def close(self) -> None:
        self.closed_at_w.append(self.gpu.limit_w)

    def sweep(self):
        recipe = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
        config = load_config(recipe, [], world_size=1)
        return sweep(config, CAPS, rule=RULE, max_slowdown=0.1, allowed=True, note=lambda _: None)


def test_settings_go_back_before_the_engine_closes(monkeypatch):
    job = Job(monkeypatch, validity="checked", fails=True)
    with pytest.raises(EnergyMeterError, match="broken"):
        job.sweep()
    assert job.closed_at_w == [700.0]


def test_a_sweep_with_invalid_energy_gives_no_result(monkeypatch):
    assert Job(monkeypatch, validity="checked", fails=False).sweep().points
    with pytest.raises(EnergyMeterError, match="not to be quoted: 5 % apart"):
        Job(monkeypatch, validity="invalid", fails=False).sweep()


def test_grids_and_shares():
    assert parse_grid("400:500:50", "power_cap_w") == [Setting(400), Setting(450), Setting(500)]
    assert parse_grid("400:650:100", "power_cap_w") == [Setting(400), Setting(500), Setting(600)]
    assert parse_grid("1200,900", "clock_mhz") == [Setting(None, 1200), Setting(None, 900)]
    assert (parse_share("3%"), parse_share("0.03"), parse_share("0")) == (0.03, 0.03, 0.0)
    for text in ("a", "1:2", "5:1:1", "-3"):
        with pytest.raises(InputError, match="write 400,500,600"):
            parse_grid(text, "clock_mhz")
    for text in ("x", "1", "-1%"):
        with pytest.raises(InputError):
            parse_share(text)
