"""An NVML of simulated GPUs that behaves like the real module: jumping counters, scopes, MIG, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

UUIDS = ("GPU-aaaa", "GPU-bbbb")


class Clock:
    """Seconds that a test moves."""

    def __init__(self, now_s: float = 50.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@dataclass
class FakeGpu:
    """One board that draws a constant power from time zero.

    Attributes:
        power_w: What it draws.
        counted: Joules that its counter counts for each that it draws.
        jump_s: Between two jumps of the counter.
        scopes: Power scopes that can be read, by number, with their share of power_w; empty: no scopes known.
        mig: Whether it is cut into instances.
        has_counter: Whether it has one.
        reset_mj: Taken off the counter, as a reload of the driver does.
    """

    power_w: float = 500.0
    counted: float = 1.0
    jump_s: float = 0.1
    scopes: dict[int, float] | None = None
    mig: bool = False
    has_counter: bool = True
    reset_mj: int = 0
    broken: bool = False
    stopped: bool = False
    power_broken: bool = False


class FakeNvml:
    """The names of pynvml that the meters use."""

    NVML_POWER_SCOPE_GPU, NVML_POWER_SCOPE_MODULE = 0, 1
    NVML_FI_DEV_POWER_AVERAGE = 185
    NVML_SUCCESS = 0
    NVML_DEVICE_MIG_DISABLE = 0

    class NVMLError(Exception):
        pass

    def __init__(self, gpus: dict[str, FakeGpu], clock: Callable[[], float]) -> None:
        self.gpus = gpus
        self.clock = clock
        self.sessions = 0
        self.power_reads = 0

    def nvmlInit(self) -> None:
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.sessions -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        raise AssertionError("an index is another GPU once CUDA_VISIBLE_DEVICES is set")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        if uuid not in self.gpus:
            raise self.NVMLError("Not Found")
        return self.gpus[uuid]

    def nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> list[int]:
        if gpu.scopes == {}:
            raise self.NVMLError("Not Supported")  # a board from before Ampere
        return [int(gpu.mig), int(gpu.mig)]

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: FakeGpu) -> int:
        if gpu.broken or not gpu.has_counter:
            raise self.NVMLError("Not Supported")
        if gpu.stopped:
            return 1_000_000
        jumped_s = int(self.clock() / gpu.jump_s + 1e-6) * gpu.jump_s
        return round(jumped_s * gpu.power_w * gpu.counted * 1e3) - gpu.reset_mj

    def nvmlDeviceGetPowerUsage(self, gpu: FakeGpu) -> int:
        if gpu.broken or gpu.power_broken:
            raise self.NVMLError("GPU is lost")
        self.power_reads += 1
        return round(gpu.power_w * 1e3)

    def nvmlDeviceGetFieldValues(self, gpu: FakeGpu, fields: list[tuple[int, int]]) -> list[Any]:
        if gpu.broken or gpu.power_broken:
            raise self.NVMLError("GPU is lost")
        ((field, scope),) = fields
        assert field == self.NVML_FI_DEV_POWER_AVERAGE
        scopes = {self.NVML_POWER_SCOPE_GPU: 1.0} if gpu.scopes is None else gpu.scopes
        if scope not in scopes:
            return [SimpleNamespace(nvmlReturn=3, value=SimpleNamespace(uiVal=0))]
        self.power_reads += 1
        value = SimpleNamespace(uiVal=round(gpu.power_w * scopes[scope] * 1e3))
        return [SimpleNamespace(nvmlReturn=self.NVML_SUCCESS, value=value)]
