"""GPUs that obey a law: NVML's functions over a power model, for tests of power limits and clocks.

A GPU at clock f draws STATIC_W + DYNAMIC_W * (f / MOST_MHZ)^3; a power cap lowers the clock until it fits. A
step has a part that takes 1 / f as long and a part (memory, links) that does not change.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

STATIC_W, DYNAMIC_W = 200.0, 500.0
MOST_MHZ, LEAST_MHZ = 1980, 990
COMPUTE_S, FIXED_S = 0.07, 0.03
DEFAULT_LIMIT_W = 700.0


class NVMLError(Exception):
    """As nvidia-ml-py's."""


class SimulatedGpu:
    """One GPU: its settings, and what follows from them."""

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self.limit_w = DEFAULT_LIMIT_W
        self.lock_mhz: int | None = None

    @property
    def clock_mhz(self) -> float:
        """The clock that the lock and the cap leave."""
        by_cap = MOST_MHZ * max(0.0, (self.limit_w - STATIC_W) / DYNAMIC_W) ** (1 / 3)
        return min(by_cap, self.lock_mhz or MOST_MHZ, MOST_MHZ)

    @property
    def power_w(self) -> float:
        """While it works."""
        return STATIC_W + DYNAMIC_W * (self.clock_mhz / MOST_MHZ) ** 3

    @property
    def step_s(self) -> float:
        """Of a training step."""
        return COMPUTE_S * MOST_MHZ / self.clock_mhz + FIXED_S


def simulated_nvml(gpus: list[SimulatedGpu], *, may_set: bool = True) -> Any:
    """A module like `pynvml` over the GPUs; without rights, what sets anything fails as NVML does."""
    by_uuid = {gpu.uuid: gpu for gpu in gpus}

    def handle(uuid: str) -> SimulatedGpu:
        if uuid not in by_uuid:
            raise NVMLError("Not Found")
        return by_uuid[uuid]

    def set_limit(gpu: SimulatedGpu, milliwatts: int) -> None:
        _check(may_set)
        gpu.limit_w = milliwatts / 1e3

    def lock(gpu: SimulatedGpu, least_mhz: int, most_mhz: int) -> None:
        _check(may_set)
        gpu.lock_mhz = most_mhz

    def unlock(gpu: SimulatedGpu) -> None:
        _check(may_set)
        gpu.lock_mhz = None

    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlClocksEventReasonSwPowerCap=4,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetPowerManagementLimit=lambda gpu: round(gpu.limit_w * 1e3),
        nvmlDeviceGetPowerManagementDefaultLimit=lambda gpu: round(DEFAULT_LIMIT_W * 1e3),
        nvmlDeviceGetPowerManagementLimitConstraints=lambda gpu: (200_000, 700_000),
        nvmlDeviceGetClockInfo=lambda gpu, kind: round(gpu.clock_mhz),
        nvmlDeviceGetTemperature=lambda gpu, kind: 60,
        nvmlDeviceGetCurrentClocksEventReasons=lambda gpu: 4 if gpu.limit_w < DEFAULT_LIMIT_W else 0,
        nvmlDeviceSetPowerManagementLimit=set_limit,
        nvmlDeviceSetGpuLockedClocks=lock,
        nvmlDeviceResetGpuLockedClocks=unlock,
    )


def _check(may_set: bool) -> None:
    if not may_set:
        raise NVMLError("Insufficient Permissions")
