"""All devices of one meter: samples go in, readings and an audit come out. No driver, no clock, no thread.

A live meter and the replay of a recorded run compute with the same banks.
"""

from __future__ import annotations

from typing import Protocol

from moe.metering.cross_check import audit_counters, audit_power
from moe.metering.device_trace import DeviceTrace, PowerTrace
from moe.metering.energy import Audit, Boundary, EnergyMeterError, EnergyReading
from moe.metering.sampling import Sample


class Bank(Protocol):
    """Devices that are sampled together.

    Attributes:
        sampled_s: When the newest sample was taken.
    """

    sampled_s: float

    def take(self, sample: Sample) -> None:
        """Add a sample; one that is older than the newest is dropped.

        Raises:
            EnergyMeterError: A device's readings are not believable.
        """
        ...

    def reading(self, now_s: float) -> EnergyReading:
        """Joules from the first sample to a time that is not before the newest one."""
        ...

    def audit(self, now_s: float) -> Audit:
        """Whether a second instrument supports them."""
        ...


class CounterBank:
    """Counters, with the power of the same devices as the independent instrument."""

    def __init__(self, devices: tuple[str, ...], first: Sample, power_boundary: Boundary) -> None:
        """Begin at the first sample; `power_boundary` is what a power reading includes."""
        self.sampled_s = first.time_s
        self._power_boundary = power_boundary
        self._traces = [
            DeviceTrace(name, first.time_s, counter_j, power_w)
            for name, counter_j, power_w in zip(devices, first.counter_j, first.power_w, strict=True)
        ]

    def take(self, sample: Sample) -> None:
        """Add a sample. Raises EnergyMeterError on a counter that was reset or stands still."""
        if sample.time_s <= self.sampled_s:
            return
        for trace, counter_j, power_w in zip(self._traces, sample.counter_j, sample.power_w, strict=True):
            trace.add(sample.time_s, counter_j, power_w)
        self.sampled_s = sample.time_s

    def reading(self, now_s: float) -> EnergyReading:
        """Joules up to a time, interpolated between the counters' jumps."""
        device_j = tuple(trace.energy_at(now_s) for trace in self._traces)
        return EnergyReading(time_s=now_s, energy_j=sum(device_j), device_j=device_j)

    def audit(self, now_s: float) -> Audit:
        """Compare each counter with its power trace."""
        return audit_counters(self._traces, now_s=now_s, power_boundary=self._power_boundary)


class PowerBank:
    """Power alone, integrated; over time without samples the last reading goes on, and the audit says so."""

    def __init__(self, devices: tuple[str, ...], first: Sample) -> None:
        """Begin at the first sample. Raises EnergyMeterError if a device gave no reading."""
        self._devices = devices
        self._opened_s = self.sampled_s = first.time_s
        self._traces = [PowerTrace(first.time_s, power_w) for power_w in self._powers_w(first)]
        self._bridged_j = [0.0] * len(devices)
        self._seen_j = [0.0] * len(devices)  # as last read: the next trapezoid may lie below the bridge

    def take(self, sample: Sample) -> None:
        """Add a sample. Raises EnergyMeterError if a device gave no reading, or zero."""
        if sample.time_s <= self.sampled_s:
            return
        for index, (trace, power_w) in enumerate(zip(self._traces, self._powers_w(sample), strict=True)):
            bridge_j = trace.bridged_j(sample.time_s)
            if not trace.add(sample.time_s, power_w):
                self._bridged_j[index] += bridge_j
        self.sampled_s = sample.time_s

    def reading(self, now_s: float) -> EnergyReading:
        """Joules up to a time; those since the newest sample at its power."""
        for index, trace in enumerate(self._traces):
            energy_j = trace.energy_j + self._bridged_j[index] + trace.bridged_j(now_s)
            self._seen_j[index] = max(self._seen_j[index], energy_j)
        return EnergyReading(time_s=now_s, energy_j=sum(self._seen_j), device_j=tuple(self._seen_j))

    def audit(self, now_s: float) -> Audit:
        """Say whether samples are missing; there is no second instrument."""
        traces = list(zip(self._devices, self._traces, strict=True))
        return audit_power(traces, now_s=now_s, opened_s=self._opened_s)

    def _powers_w(self, sample: Sample) -> list[float]:
        for name, power_w in zip(self._devices, sample.power_w, strict=True):
            if power_w is None:
                raise EnergyMeterError(f"{name}: gives no power reading, or 0 W, which no powered GPU draws")
        return [power_w for power_w in sample.power_w if power_w is not None]
