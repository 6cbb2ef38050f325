"""NVML meters against a small NVML that behaves like the real module, counters and errors included."""

from __future__ import annotations

import time

import pytest

from moe.errors import InputError
from moe.metering.energy import EnergyMeterError
from moe.metering.nvml import COUNTER_STALL_S, NvmlCounterMeter, NvmlPowerMeter

UUIDS = ["GPU-aaaa", "GPU-bbbb"]


class FakeNvml:
    """The six names of pynvml that the meters use."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, has_counter: bool = True) -> None:
        self.counter_mj = dict.fromkeys(UUIDS, 1_000_000)
        self.power_mw = dict.fromkeys(UUIDS, 100_000)
        self.has_counter = has_counter
        self.broken = False
        self.sessions = 0
        self.power_reads = 0

    def nvmlInit(self) -> None:
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.sessions -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.counter_mj:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.broken or not self.has_counter:
            raise self.NVMLError("Not Supported")
        return self.counter_mj[handle]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if self.broken:
            raise self.NVMLError("GPU is lost")
        self.power_reads += 1
        return self.power_mw[handle]


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_counter_sums_gpus_in_joules_from_opening(clock: Clock) -> None:
    nvml = FakeNvml()
    meter = NvmlCounterMeter(nvml, UUIDS, clock=clock)
    before = meter.read()
    nvml.counter_mj["GPU-aaaa"] += 700_500
    nvml.counter_mj["GPU-bbbb"] += 300_000
    clock.now_s += 2.0
    after = meter.read()
    assert (before.energy_j, after.energy_j, after.time_s) == (0.0, 1000.5, 52.0)
    assert (after.energy_j - before.energy_j) / (after.time_s - before.time_s) == pytest.approx(500.25)
    assert (meter.source, meter.boundary, meter.idle_w) == ("nvml_counter", "gpu", 200.0)
    meter.close()
    assert nvml.sessions == 0


def test_counter_finds_gpu_by_cuda_uuid_without_prefix() -> None:
    assert "GPU-bbbb" in NvmlCounterMeter(FakeNvml(), ["bbbb"]).description


def test_counter_going_backwards_raises_and_names_gpu(clock: Clock) -> None:
    nvml = FakeNvml()
    meter = NvmlCounterMeter(nvml, UUIDS, clock=clock)
    nvml.counter_mj["GPU-aaaa"] += 5
    nvml.counter_mj["GPU-bbbb"] = 0
    with pytest.raises(EnergyMeterError, match=r"GPU-bbbb.*back by 1000000 mJ"):
        meter.read()


def test_counter_standing_still_raises_only_after_stall_time(clock: Clock) -> None:
    nvml = FakeNvml()
    meter = NvmlCounterMeter(nvml, UUIDS, clock=clock)
    clock.now_s += COUNTER_STALL_S / 2
    nvml.counter_mj["GPU-aaaa"] += 5
    assert meter.read().energy_j == 0.005
    clock.now_s += COUNTER_STALL_S / 2 + 0.1
    with pytest.raises(EnergyMeterError, match=r"GPU-bbbb.*not counting"):
        meter.read()


def test_counter_failure_in_the_middle_raises() -> None:
    nvml = FakeNvml()
    meter = NvmlCounterMeter(nvml, UUIDS)
    nvml.broken = True
    with pytest.raises(EnergyMeterError, match=r"GPU-aaaa.*TotalEnergyConsumption.*Not Supported"):
        meter.read()


@pytest.mark.parametrize(
    ("uuids", "message"), [([], "at least one GPU UUID"), (["GPU-cccc"], "GPU-cccc.*nvidia-smi -L")]
)
def test_counter_refuses_missing_gpu_and_ends_session(uuids: list[str], message: str) -> None:
    nvml = FakeNvml()
    with pytest.raises(InputError, match=message):
        NvmlCounterMeter(nvml, uuids)
    assert nvml.sessions == 0


def test_counter_unsupported_is_refused_and_ends_session() -> None:
    nvml = FakeNvml(has_counter=False)
    with pytest.raises(InputError, match=r"no energy counter.*Not Supported"):
        NvmlCounterMeter(nvml, UUIDS)
    assert nvml.sessions == 0


def test_power_integrates_trapezoids(clock: Clock) -> None:
    nvml = FakeNvml(has_counter=False)
    # A period longer than the test leaves every sample to read().
    meter = NvmlPowerMeter(nvml, UUIDS, period_s=60, clock=clock)
    clock.now_s += 4.0
    nvml.power_mw = dict.fromkeys(UUIDS, 300_000)
    assert meter.read().energy_j == pytest.approx((200 + 600) / 2 * 4.0)
    clock.now_s += 1.0
    assert meter.read().energy_j == pytest.approx(1600 + 600)
    assert (meter.source, meter.boundary, meter.idle_w) == ("nvml_power", "gpu", 200.0)
    meter.close()
    assert nvml.sessions == 0


def test_power_thread_sees_a_peak_between_two_reads() -> None:
    nvml = FakeNvml(has_counter=False)
    meter = NvmlPowerMeter(nvml, ["GPU-aaaa"], period_s=0.005)
    nvml.power_mw["GPU-aaaa"] = 900_000
    reads_at_peak = nvml.power_reads + 3
    time.sleep(0.2)
    while nvml.power_reads < reads_at_peak:
        time.sleep(0.01)
    nvml.power_mw["GPU-aaaa"] = 100_000
    energy_j = meter.read().energy_j
    meter.close()
    # Without the thread, the trapezoid between the two ends would be 100 W x 0.2 s = 20 J.
    assert energy_j > 60


@pytest.mark.parametrize("fault", ["broken", "zero"])
def test_power_failure_in_the_thread_reaches_every_later_read(fault: str) -> None:
    nvml = FakeNvml(has_counter=False)
    meter = NvmlPowerMeter(nvml, UUIDS, period_s=0.005)
    nvml.broken = fault == "broken"
    nvml.power_mw["GPU-bbbb"] = 0 if fault == "zero" else 100_000
    meter._sampler._thread.join(timeout=10)
    nvml.broken, nvml.power_mw["GPU-bbbb"] = False, 100_000
    for _ in range(2):
        with pytest.raises(
            EnergyMeterError, match="GPU-aaaa.*lost" if fault == "broken" else "GPU-bbbb.*0 W"
        ):
            meter.read()
    meter.close()
