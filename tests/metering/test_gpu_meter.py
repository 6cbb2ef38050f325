"""The GPU meter over a simulated NVML: what it counts, what it refuses, and how each fault ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import UUIDS, Clock, FakeGpu, FakeNvml

from moe.errors import InputError
from moe.metering.choose import choose_meter
from moe.metering.device_trace import COUNTER_STALL_S
from moe.metering.energy import EnergyMeterError
from moe.metering.estimate import PowerModel
from moe.metering.gpu_meter import SAMPLE_PERIOD_S, GpuMeter
from moe.metering.nvml import NvmlBoards
from moe.metering.trace_file import ReplayMeter, TraceWriter

Open = Callable[..., tuple[GpuMeter, FakeNvml, Clock]]


@pytest.fixture
def open_meter() -> Iterator[Open]:
    """Opens a meter on simulated GPUs at 50 s of a clock that the test moves."""
    with ExitStack() as stack:

        def make(*gpus: FakeGpu, **options: Any) -> tuple[GpuMeter, FakeNvml, Clock]:
            clock = Clock()
            nvml = FakeNvml(dict(zip(UUIDS, gpus or (FakeGpu(),), strict=False)), clock)
            uuids = options.pop("uuids", list(nvml.gpus))
            meter = GpuMeter(NvmlBoards(nvml, uuids), clock=clock, **options)
            stack.callback(meter.close)
            return meter, nvml, clock

        yield make


def run(meter: GpuMeter | ReplayMeter, clock: Clock, seconds: float) -> float:
    """Sample for so long as the side thread would; the joules read at the end."""
    end_s = clock.now_s + seconds
    while clock.now_s < end_s - 1e-9:
        clock.now_s = min(clock.now_s + SAMPLE_PERIOD_S, end_s)
        energy_j = meter.read().energy_j
    return energy_j


def test_joules_of_all_gpus_from_opening(open_meter: Open) -> None:
    meter, nvml, clock = open_meter(FakeGpu(power_w=500), FakeGpu(power_w=200))
    assert meter.read().energy_j == 0
    assert run(meter, clock, 10) == pytest.approx(7000, rel=0.01)
    reading = meter.read()
    assert reading.device_j == pytest.approx((5000, 2000), rel=0.01)
    assert reading.time_s == 60
    assert (meter.source, meter.boundary, meter.idle_w) == ("nvml_counter", "gpu", 700)
    assert meter.devices == UUIDS
    meter.close()
    assert nvml.sessions == 0


def test_reads_between_two_samples_ask_the_driver_nothing_and_go_on_with_the_power(open_meter: Open) -> None:
    meter, nvml, clock = open_meter(period_s=30)
    asked = nvml.power_reads
    clock.now_s += 0.02
    first_j = meter.read().energy_j
    clock.now_s += 0.03
    assert meter.read().energy_j - first_j == pytest.approx(500 * 0.03)
    assert nvml.power_reads == asked


def test_step_boundaries_are_interpolated_between_jumps_of_the_counter(open_meter: Open) -> None:
    meter, nvml, clock = open_meter(FakeGpu(power_w=500, jump_s=0.1))
    run(meter, clock, 1.0)
    gpu, step_s = nvml.gpus["GPU-aaaa"], 0.17
    before_j, raw_before_mj = meter.read().energy_j, nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
    errors_j, raw_errors_j = [], []
    for _ in range(200):
        energy_j, raw_mj = run(meter, clock, step_s), nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
        errors_j.append(abs(energy_j - before_j - 500 * step_s))
        raw_errors_j.append(abs((raw_mj - raw_before_mj) / 1e3 - 500 * step_s))
        before_j, raw_before_mj = energy_j, raw_mj
    # A jump is dated to within half a sampling period, at either end of a step; the counter as read would be
    # off by more, and errors do not add up.
    assert max(errors_j) <= 500 * SAMPLE_PERIOD_S + 1e-6 < max(raw_errors_j)
    assert meter.read().energy_j == pytest.approx(500 * (clock.now_s - 50), rel=2e-3)


def test_counter_reset_is_an_error_that_stays(open_meter: Open) -> None:
    meter, nvml, clock = open_meter(FakeGpu(), FakeGpu())
    run(meter, clock, 1)
    nvml.gpus["GPU-bbbb"].reset_mj = 20_000_000
    clock.now_s += 0.1
    with pytest.raises(EnergyMeterError, match=r"GPU-bbbb: the energy counter went back by .* driver"):
        meter.read()
    nvml.gpus["GPU-bbbb"].reset_mj = 0
    clock.now_s += 0.1
    with pytest.raises(EnergyMeterError, match="went back"):
        meter.read()
    audit = meter.audit()
    assert (audit.validity, "went back" in audit.detail) == ("invalid", True)


def test_counter_that_wraps_is_an_error_never_a_huge_figure(open_meter: Open) -> None:
    meter, nvml, clock = open_meter()
    run(meter, clock, 1)
    nvml.gpus["GPU-aaaa"].reset_mj = 25_000_000  # as if 2**n were taken off
    clock.now_s += 0.1
    with pytest.raises(EnergyMeterError, match="went back"):
        meter.read()


def test_counter_standing_still_is_an_error_after_the_stall_time(open_meter: Open) -> None:
    meter, _, clock = open_meter(FakeGpu(stopped=True))
    clock.now_s += COUNTER_STALL_S / 2
    assert meter.read().energy_j == pytest.approx(500 * COUNTER_STALL_S / 2)
    clock.now_s += COUNTER_STALL_S
    with pytest.raises(EnergyMeterError, match="so it is not counting"):
        meter.read()


def test_driver_error_reaches_the_reader_from_the_thread_and_stays(open_meter: Open) -> None:
    meter, nvml, _ = open_meter(period_s=0.01)
    nvml.gpus["GPU-aaaa"].broken = True
    meter._sampler._thread.join(timeout=10)
    nvml.gpus["GPU-aaaa"].broken = False
    for _ in range(2):
        with pytest.raises(EnergyMeterError, match=r"GPU-aaaa.*cannot be read: Not Supported"):
            meter.read()


@pytest.mark.parametrize(
    ("counted", "validity"), [(1.0, "checked"), (1.02, "checked"), (1.05, "invalid"), (0.95, "invalid")]
)
def test_counter_and_trace_must_agree_within_three_percent(
    counted: float, validity: str, open_meter: Open
) -> None:
    meter, _, clock = open_meter(FakeGpu(power_w=400, counted=counted))
    run(meter, clock, 90)
    audit = meter.audit()
    assert audit.validity == validity, audit.detail
    assert audit.trace_j == pytest.approx(400 * 90, rel=1e-3)
    assert audit.counter_j == pytest.approx(400 * 90 * counted, rel=2e-3)
    for figure in (audit.counter_j, audit.trace_j, audit.window_s):
        assert f"{figure:,.1f}" in audit.detail


def test_one_wrong_gpu_is_not_hidden_in_the_sum(open_meter: Open) -> None:
    meter, _, clock = open_meter(FakeGpu(power_w=700), FakeGpu(power_w=70, counted=1.25))
    run(meter, clock, 70)
    audit = meter.audit()
    assert audit.counter_j == pytest.approx(audit.trace_j, rel=0.025)
    assert audit.validity == "invalid"
    assert "GPU-bbbb" in audit.detail


def test_short_window_is_left_open_with_both_figures(open_meter: Open) -> None:
    meter, _, clock = open_meter(FakeGpu(counted=1.3))
    run(meter, clock, 20)
    audit = meter.audit()
    assert audit.validity == "unchecked"
    assert audit.counter_j == pytest.approx(13_000, rel=0.01)
    assert audit.trace_j == pytest.approx(10_000, rel=0.01)
    assert "compared over 20.0 s" in audit.detail


def test_missing_power_leaves_the_counter_and_lowers_the_audit(open_meter: Open) -> None:
    meter, nvml, clock = open_meter(FakeGpu(power_w=300))
    run(meter, clock, 70)
    nvml.gpus["GPU-aaaa"].power_broken = True
    run(meter, clock, 20)
    nvml.gpus["GPU-aaaa"].power_broken = False
    assert run(meter, clock, 1) == pytest.approx(300 * 91, rel=0.005)
    audit = meter.audit()
    assert audit.validity == "unchecked"
    assert "not sampled for 20" in audit.detail
    # Nothing is compared with time that the trace did not see.
    assert audit.counter_j == pytest.approx(audit.trace_j, rel=0.01)


def test_missing_samples_of_power_alone_make_it_invalid(open_meter: Open) -> None:
    meter, _, clock = open_meter(FakeGpu(power_w=300, has_counter=False), by="power")
    assert (meter.source, meter.boundary) == ("nvml_power", "gpu")
    assert run(meter, clock, 70) == pytest.approx(300 * 70)
    assert meter.audit().validity == "unchecked"
    clock.now_s += 5
    assert meter.read().energy_j == pytest.approx(300 * 75)
    audit = meter.audit()
    assert audit.validity == "invalid"
    assert "not sampled for 5.0 of 75.0 s" in audit.detail


def test_power_alone_integrates_what_changes_between_reads(open_meter: Open) -> None:
    meter, nvml, clock = open_meter(FakeGpu(power_w=100, has_counter=False), by="power")
    clock.now_s += 0.5
    meter.read()
    nvml.gpus["GPU-aaaa"].power_w = 300
    clock.now_s += 0.5
    assert meter.read().energy_j == pytest.approx(100 * 0.5 + 200 * 0.5)


def test_zero_watts_without_a_counter_is_an_error(open_meter: Open) -> None:
    meter, nvml, clock = open_meter(FakeGpu(has_counter=False), by="power")
    nvml.gpus["GPU-aaaa"].power_w = 0
    clock.now_s += 0.1
    with pytest.raises(EnergyMeterError, match=r"GPU-aaaa.*0 W, which no powered GPU draws"):
        meter.read()


def test_thread_sees_a_peak_between_two_reads() -> None:
    nvml = FakeNvml({"GPU-aaaa": FakeGpu(power_w=100, has_counter=False)}, time.monotonic)
    meter = GpuMeter(NvmlBoards(nvml, ["GPU-aaaa"]), "power", period_s=0.005)
    nvml.gpus["GPU-aaaa"].power_w = 900
    reads_at_peak = nvml.power_reads + 3
    time.sleep(0.2)
    while nvml.power_reads < reads_at_peak:
        time.sleep(0.01)
    nvml.gpus["GPU-aaaa"].power_w = 100
    energy_j = meter.read().energy_j
    meter.close()
    # Without the thread, the trapezoid between the two ends would be 100 W x 0.2 s = 20 J.
    assert energy_j > 60


def test_two_gpus_behind_remapped_cuda_visible_devices(open_meter: Open) -> None:
    """CUDA_VISIBLE_DEVICES=1,0: CUDA's first device is NVML's second, and only its UUID says so."""
    meter, _, clock = open_meter(
        FakeGpu(power_w=100), FakeGpu(power_w=600), uuids=["bbbb", "GPU-aaaa", "GPU-bbbb"]
    )
    run(meter, clock, 10)
    assert meter.devices == ("GPU-bbbb", "GPU-aaaa")  # each once, also with two ranks on one
    assert meter.read().device_j == pytest.approx((6000, 1000), rel=0.01)


def test_one_visible_gpu_of_two_is_counted_alone(open_meter: Open) -> None:
    meter, _, clock = open_meter(FakeGpu(power_w=100), FakeGpu(power_w=600), uuids=["GPU-bbbb"])
    assert run(meter, clock, 10) == pytest.approx(6000, rel=0.01)


@pytest.mark.parametrize(
    ("module_over_gpu", "validity", "words"),
    [
        (1.4, "unchecked", "only the module's power can be read"),
        (1.0, "invalid", "counts the whole module, not the GPU alone"),
        (0.9, "invalid", "counts more than the power trace"),
    ],
)
def test_grace_whose_gpu_power_cannot_be_read_alone(
    module_over_gpu: float, validity: str, words: str, open_meter: Open
) -> None:
    meter, _, clock = open_meter(FakeGpu(scopes={FakeNvml.NVML_POWER_SCOPE_MODULE: module_over_gpu}))
    run(meter, clock, 70)
    audit = meter.audit()
    assert (audit.validity, words in audit.detail) == (validity, True), audit.detail
    assert meter.boundary == "gpu"
    assert "power (module) beside it" in meter.description


def test_grace_without_a_counter_is_measured_by_the_module_and_labelled_so(open_meter: Open) -> None:
    grace = FakeGpu(has_counter=False, scopes={FakeNvml.NVML_POWER_SCOPE_MODULE: 1.5})
    meter, _, clock = open_meter(grace, by="power")
    assert run(meter, clock, 4) == pytest.approx(500 * 1.5 * 4)
    assert meter.boundary == "module"
    assert "CPU included" in meter.description


def test_gpu_scope_is_taken_where_both_can_be_read(open_meter: Open) -> None:
    both = {FakeNvml.NVML_POWER_SCOPE_GPU: 1.0, FakeNvml.NVML_POWER_SCOPE_MODULE: 1.5}
    meter, _, clock = open_meter(FakeGpu(scopes=both))
    run(meter, clock, 70)
    assert meter.audit().validity == "checked"


def test_board_without_scopes_is_read_the_old_way(open_meter: Open) -> None:
    meter, _, clock = open_meter(FakeGpu(scopes={}))
    run(meter, clock, 70)
    assert meter.audit().validity == "checked"


@pytest.mark.parametrize("uuids", [["MIG-1234"], ["GPU-aaaa"]], ids=["instance", "cut GPU"])
def test_mig_is_refused_and_auto_says_why_it_estimates(uuids: list[str]) -> None:
    nvml = FakeNvml({"GPU-aaaa": FakeGpu(mig=True)}, time.monotonic)
    with pytest.raises(InputError, match=r"MIG instances.*energy\.gpu_w"):
        NvmlBoards(nvml, uuids)
    assert nvml.sessions == 0
    model = PowerModel(idle_w=1, active_w_per_core=1, gpu_w=100, provenance="this test")
    meter = choose_meter("auto", gpu_uuids=uuids, pids=[os.getpid()], power_model=model, nvml=nvml)
    assert meter.source == "estimated"
    assert "MIG" in meter.description


@pytest.mark.parametrize(
    ("uuids", "message"), [([], "at least one GPU UUID"), (["GPU-cccc"], "GPU-cccc.*nvidia-smi -L")]
)
def test_missing_gpu_is_refused_and_ends_the_session(uuids: list[str], message: str) -> None:
    nvml = FakeNvml({"GPU-aaaa": FakeGpu()}, time.monotonic)
    with pytest.raises(InputError, match=message):
        NvmlBoards(nvml, uuids)
    assert nvml.sessions == 0


def test_gpu_without_a_counter_is_refused_and_auto_integrates_its_power() -> None:
    nvml = FakeNvml({"GPU-aaaa": FakeGpu(has_counter=False)}, time.monotonic)
    with pytest.raises(InputError, match=r"no energy counter.*Not Supported"):
        GpuMeter(NvmlBoards(nvml, ["GPU-aaaa"]))
    assert nvml.sessions == 0
    model = PowerModel(idle_w=1, active_w_per_core=1, provenance="this test")
    meter = choose_meter("auto", gpu_uuids=["GPU-aaaa"], pids=[], power_model=model, nvml=nvml)
    meter.close()
    assert meter.source == "nvml_power"
    assert "integrated because there is no energy counter" in meter.description


@pytest.mark.parametrize("by", ["counter", "power"])
def test_replay_of_a_recorded_meter_says_what_it_said(by: str, open_meter: Open, tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "energy_trace" / "host.jsonl")
    live, _, clock = open_meter(
        FakeGpu(power_w=400, counted=1.05), FakeGpu(power_w=100), by=by, record=writer
    )
    run(live, clock, 75)
    reading, audit = live.read(), live.audit()
    live.close()
    writer.close()
    replay = ReplayMeter(tmp_path / "energy_trace" / "host.jsonl", clock=clock)
    assert replay.read() == reading
    assert replay.audit() == audit
    assert (replay.source, replay.boundary, replay.devices) == (live.source, live.boundary, live.devices)
    assert replay.idle_w == live.idle_w


def test_recorder_that_cannot_write_ends_the_recording_only(open_meter: Open, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = TraceWriter(tmp_path / "file" / "trace.jsonl")
    meter, _, clock = open_meter(record=writer)
    assert run(meter, clock, 1) > 0
    assert "cannot be written" in (writer.problem or "")


def test_simulated_nvml_has_the_names_and_constants_of_the_real_one() -> None:
    pynvml = pytest.importorskip("pynvml")
    names = {name for name in vars(FakeNvml) if name.startswith(("nvml", "NVML"))}
    assert {name for name in names if not hasattr(pynvml, name)} == set()
    constants = {name for name in names if name.isupper()}
    assert {name: getattr(FakeNvml, name) for name in constants} == {
        name: getattr(pynvml, name) for name in constants
    }
    assert {"nvmlReturn", "value"} <= {field for field, _ in pynvml.c_nvmlFieldValue_t._fields_}
    with pytest.raises(InputError, match="NVML"):  # no driver, or no such GPU
        NvmlBoards(pynvml, ["GPU-00000000-0000-0000-0000-000000000000"])
