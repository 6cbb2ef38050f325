"""GPU energy through NVML: the board's energy counter, or its power reading integrated where there is none.

GPUs are addressed by UUID, because an index means another GPU as soon as CUDA_VISIBLE_DEVICES is set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from moe.errors import InputError
from moe.metering.energy import Boundary, EnergyMeterError, EnergyReading, Source
from moe.metering.sampling import BackgroundSampler

# The counter moves every 20 to 100 ms (measurements of the Zeus and PETSc projects), so a GPU, which never
# draws zero watts, cannot leave it unchanged for this long.
COUNTER_STALL_S = 2.0
# 10 Hz. The reading itself is an average over 1 s from Ampere on (GA100 excepted), and polling faster than
# every 50 ms makes some drivers return "not supported" (Zeus issue 186).
POWER_PERIOD_S = 0.1


class Gpus:
    """An open NVML session on the given GPUs; every NVML failure leaves it as EnergyMeterError."""

    def __init__(self, nvml: Any, uuids: Sequence[str]) -> None:
        """Open the session.

        Args:
            nvml: The `pynvml` module of nvidia-ml-py.
            uuids: CUDA or NVML device UUIDs, with or without the "GPU-" prefix.

        Raises:
            InputError: No UUID was given, NVML cannot start, or it does not know a UUID.
        """
        if not uuids:
            raise InputError("the NVML meter needs at least one GPU UUID; this process uses no CUDA device")
        self.nvml = nvml
        self.uuids = [_nvml_uuid(uuid) for uuid in uuids]
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise InputError(
                f"NVML cannot start ({error}); check that nvidia-smi runs on this machine"
            ) from error
        self.handles = [self._handle(uuid) for uuid in self.uuids]

    def energy_mj(self) -> list[int]:
        """Return each GPU's energy counter: millijoules since its driver was loaded."""
        return self._query(self.nvml.nvmlDeviceGetTotalEnergyConsumption)

    def power_mw(self) -> list[int]:
        """Return each GPU's power in milliwatts."""
        return self._query(self.nvml.nvmlDeviceGetPowerUsage)

    def idle_w(self) -> float | None:
        """Return the power of all GPUs in watts, as the meter opens before the work; None if unknown."""
        try:
            return sum(self.power_mw()) / 1e3
        except EnergyMeterError:
            return None

    def close(self) -> None:
        """End the NVML session (NVML counts its users, so others are not disturbed)."""
        self.nvml.nvmlShutdown()

    def _handle(self, uuid: str) -> Any:
        try:
            return self.nvml.nvmlDeviceGetHandleByUUID(uuid)
        except self.nvml.NVMLError as error:
            self.close()
            raise InputError(
                f"NVML does not know GPU {uuid} ({error}); `nvidia-smi -L` lists the UUIDs"
            ) from error

    def _query(self, function: Callable[[Any], int]) -> list[int]:
        values = []
        for uuid, handle in zip(self.uuids, self.handles, strict=True):
            try:
                values.append(int(function(handle)))
            except self.nvml.NVMLError as error:
                raise EnergyMeterError(f"GPU {uuid}: {function.__name__} failed: {error}") from error
        return values


class NvmlCounterMeter:
    """Joules from each GPU's energy counter, which lags by up to 0.1 s; costs nothing between reads."""

    source: Source = "nvml_counter"
    boundary: Boundary = "gpu"

    def __init__(
        self, nvml: Any, uuids: Sequence[str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Open the meter.

        Args:
            nvml: The `pynvml` module of nvidia-ml-py.
            uuids: The GPUs to count.
            clock: Monotonic seconds.

        Raises:
            InputError: A GPU cannot be reached or has no energy counter.
        """
        self._gpus = Gpus(nvml, uuids)
        self._clock = clock
        try:
            self._last_mj = self._gpus.energy_mj()
        except EnergyMeterError as error:
            self._gpus.close()
            raise InputError(f"there is no energy counter: {error}") from error
        self._moved_s = [clock()] * len(self._last_mj)
        self._total_mj = 0
        self.idle_w = self._gpus.idle_w()
        self.description = f"measured: NVML energy counter of {_listing(self._gpus.uuids)}; GPU boards only"

    def read(self) -> EnergyReading:
        """Return the joules of all GPUs since the meter opened.

        Raises:
            EnergyMeterError: NVML failed, a counter ran backwards (a driver reload), or one stood still.
        """
        now_mj, now_s = self._gpus.energy_mj(), self._clock()
        for i, uuid in enumerate(self._gpus.uuids):
            delta_mj = now_mj[i] - self._last_mj[i]
            if delta_mj < 0:
                raise EnergyMeterError(
                    f"GPU {uuid}: the energy counter went back by {-delta_mj} mJ (was the driver reloaded?)"
                )
            if delta_mj > 0:
                self._moved_s[i] = now_s
            elif now_s - self._moved_s[i] > COUNTER_STALL_S:
                raise EnergyMeterError(
                    f"GPU {uuid}: the energy counter stands at {now_mj[i]} mJ "
                    f"since {now_s - self._moved_s[i]:.1f} s, so it is not counting"
                )
            self._total_mj += delta_mj
        self._last_mj = now_mj
        return EnergyReading(time_s=now_s, energy_j=self._total_mj / 1e3)

    def close(self) -> None:
        """End the NVML session."""
        self._gpus.close()


class NvmlPowerMeter:
    """Joules from the power reading of each GPU: a side thread samples it, trapezoids integrate it."""

    source: Source = "nvml_power"
    boundary: Boundary = "gpu"

    def __init__(
        self,
        nvml: Any,
        uuids: Sequence[str],
        *,
        period_s: float = POWER_PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the meter and start its thread.

        Args:
            nvml: The `pynvml` module of nvidia-ml-py.
            uuids: The GPUs to sample.
            period_s: Seconds between samples.
            clock: Monotonic seconds.

        Raises:
            InputError: A GPU cannot be reached or reports no power.
        """
        self._gpus = Gpus(nvml, uuids)
        self._clock = clock
        try:
            self._last_w = self._power_w()
        except EnergyMeterError as error:
            self._gpus.close()
            raise InputError(f"no power reading: {error}; use the meter `estimate`") from error
        self._last_s = clock()
        self._energy_j = 0.0
        self.idle_w: float | None = self._last_w
        self.description = (
            f"measured: NVML power of {_listing(self._gpus.uuids)}, sampled every {period_s:g} s and "
            "integrated; GPU boards only"
        )
        self._sampler = BackgroundSampler(self._sample, period_s=period_s)

    def read(self) -> EnergyReading:
        """Return the joules of all GPUs since the meter opened.

        Raises:
            EnergyMeterError: NVML failed or a GPU reported no power, now or since the last read.
        """
        self._sampler.sample_now()
        return EnergyReading(time_s=self._last_s, energy_j=self._energy_j)

    def close(self) -> None:
        """Stop the thread and end the NVML session."""
        self._sampler.close()
        self._gpus.close()

    def _sample(self) -> None:
        now_w, now_s = self._power_w(), self._clock()
        self._energy_j += (self._last_w + now_w) / 2 * (now_s - self._last_s)
        self._last_w, self._last_s = now_w, now_s

    def _power_w(self) -> float:
        powers_mw = self._gpus.power_mw()
        if 0 in powers_mw:
            uuid = self._gpus.uuids[powers_mw.index(0)]
            raise EnergyMeterError(f"GPU {uuid}: reports 0 W, which no powered GPU draws")
        return sum(powers_mw) / 1e3


def _nvml_uuid(uuid: str) -> str:
    """Return a UUID as NVML writes it; CUDA's device properties leave out the prefix."""
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def _listing(uuids: Sequence[str]) -> str:
    return f"{len(uuids)} GPU{'s' if len(uuids) > 1 else ''} ({', '.join(uuids)})"
