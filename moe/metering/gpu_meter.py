"""The meter of GPU boards of any maker: their counters with a power trace beside them, or their power alone.

A side thread samples; nothing here waits for a GPU or is called by its streams. Zeus (`zeus.monitor`) is not
used: its windows synchronise CUDA at both ends, which perturbs the overlap that is being measured, it reads
GPUs by index, and it has no second instrument to check the first against.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, Protocol

from moe.errors import InputError
from moe.metering.banks import Bank, CounterBank, PowerBank
from moe.metering.energy import Audit, Boundary, EnergyMeterError, EnergyReading, Source
from moe.metering.sampling import BackgroundSampler, Recorder, Sample

# 17 Hz. Faster than every 50 ms, some drivers answer "not supported" or zero (Zeus issue 186).
SAMPLE_PERIOD_S = 0.06


class Boards(Protocol):
    """An open session with a driver on the GPUs of this job.

    Attributes:
        names: UUIDs or PCI addresses, each once.
        counter_source: What joules from the counters are called.
        power_source: What joules from the power readings are called.
        power_boundary: What a power reading includes: `gpu`, or `module` where no GPU can be read alone.
    """

    names: tuple[str, ...]
    counter_source: Source
    power_source: Source
    power_boundary: Boundary

    def counters_j(self) -> list[float]:
        """Each GPU's energy counter, joules. Raises EnergyMeterError if the driver fails."""
        ...

    def powers_w(self) -> list[float | None]:
        """Each GPU's power, watts; None where the driver gives none (zero watts is none)."""
        ...

    def close(self) -> None:
        """End the session."""
        ...


class GpuMeter:
    """Joules of GPU boards, by their counters or by their integrated power."""

    def __init__(
        self,
        boards: Boards,
        by: Literal["counter", "power"] = "counter",
        *,
        period_s: float = SAMPLE_PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
        record: Recorder | None = None,
    ) -> None:
        """Open the meter and start its thread; the driver's session is closed with it, also if this fails.

        Args:
            boards: The GPUs to count.
            by: The instrument to report. Counters are checked against power; power stands alone.
            period_s: Seconds between samples.
            clock: Monotonic seconds.
            record: Takes every sample, for a replay.

        Raises:
            InputError: A GPU has no such instrument.
        """
        self._boards, self._clock, self._record = boards, clock, record
        self._by, self._period_s = by, period_s
        counts = by == "counter"
        self.devices = boards.names
        self.source = boards.counter_source if counts else boards.power_source
        self.boundary: Boundary = "gpu" if counts else boards.power_boundary
        try:
            first = self._fetch()
            self._bank = self._open_bank(first)
        except EnergyMeterError as error:
            boards.close()
            raise InputError(f"there is no energy {by} reading: {error}") from error
        self.idle_w = _sum_or_none(first.power_w)
        beside = f", power ({boards.power_boundary}) beside it" if counts else ", integrated"
        what = "superchip modules, CPU included," if self.boundary == "module" else "GPU boards"
        self.description = (
            f"measured: {self.source} of {len(self.devices)} GPU(s) ({', '.join(self.devices)}){beside}, "
            f"sampled every {period_s:g} s; {what} only"
        )
        if record is not None:
            record.begin(devices=self.devices, source=self.source, power_boundary=boards.power_boundary)
            record.take(first)
        self._sampler = BackgroundSampler(self._fetch, self._take, period_s=period_s)

    def read(self) -> EnergyReading:
        """Return the joules of all GPUs since the meter opened, at this moment.

        Raises:
            EnergyMeterError: The driver failed, a counter ran backwards or stood still, or, without
                counters, a GPU reported no power; now or since the last read.
        """
        return self._sampler.call(self._reading)

    def audit(self) -> Audit:
        """Compare the instruments since the meter opened."""
        try:
            return self._sampler.call(lambda: self._bank.audit(self._clock()))
        except EnergyMeterError as error:
            return Audit(validity="invalid", detail=str(error))

    def close(self) -> None:
        """Stop the thread and end the driver's session."""
        self._sampler.close()
        self._boards.close()

    def _open_bank(self, first: Sample) -> Bank:
        if self._by == "counter":
            return CounterBank(self.devices, first, self._boards.power_boundary)
        return PowerBank(self.devices, first)

    def _reading(self) -> EnergyReading:
        # Between two samples nothing is asked: samples too close to each other upset drivers.
        if self._clock() - self._bank.sampled_s >= self._period_s:
            self._take(self._fetch())
        return self._bank.reading(max(self._clock(), self._bank.sampled_s))

    def _fetch(self) -> Sample:
        counters_j = self._boards.counters_j() if self._by == "counter" else []
        powers_w = self._boards.powers_w()
        return Sample(self._clock(), tuple(counters_j), tuple(powers_w))

    def _take(self, sample: Sample) -> None:
        if self._record is not None and sample.time_s > self._bank.sampled_s:
            self._record.take(sample)
        self._bank.take(sample)


def _sum_or_none(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
