"""Joules of one device out of the samples of its counter and of its power: no driver, no clock, no thread.

What a live meter and the replay of a recorded run both compute with, so that one can audit the other.
"""

from __future__ import annotations

from collections import deque

from moe.metering.energy import EnergyMeterError

# A GPU's counter moves every 20 to 100 ms (measurements of the Zeus and PETSc projects), and a GPU never
# draws zero watts, so a counter cannot stand still for this long.
COUNTER_STALL_S = 2.0
# Two samples of power this far apart are no evidence for the time between: from Ampere on (GA100 excepted)
# a reading is the mean of one second.
GAP_S = 1.0
# How far back a reading can be asked for.
HISTORY_S = 60.0


class CounterTrace:
    """A counter that moves in jumps, turned into joules at any time.

    A jump is dated to the middle of the two samples that it fell between, which is late or early by half the
    sampling period at most. Between two jumps energy grows evenly; after the last one it grows with the
    power, until the counter is seen to jump again.
    """

    def __init__(self, name: str, time_s: float, counter_j: float) -> None:
        self.name = name
        self.last_j = counter_j  # the counter itself
        self._opening_j = counter_j
        self._sampled_s = time_s
        self._jumps = deque([(time_s, counter_j)])
        self._seen_j = 0.0

    def add(self, time_s: float, counter_j: float) -> None:
        """Take a sample.

        Raises:
            EnergyMeterError: The counter ran backwards (a driver reload: 64 bits of millijoules never wrap)
                or stands still.
        """
        if counter_j < self.last_j:
            raise EnergyMeterError(
                f"{self.name}: the energy counter went back by {self.last_j - counter_j:.3f} J "
                "(was the driver reloaded?)"
            )
        if counter_j > self.last_j:
            self._jumps.append(((self._sampled_s + time_s) / 2, counter_j))
            self.last_j = counter_j
        elif time_s - self._jumps[-1][0] > COUNTER_STALL_S:
            raise EnergyMeterError(
                f"{self.name}: the energy counter stands at {counter_j:.3f} J "
                f"since {time_s - self._jumps[-1][0]:.1f} s, so it is not counting"
            )
        self._sampled_s = time_s
        while len(self._jumps) > 2 and self._jumps[1][0] < time_s - HISTORY_S:
            self._jumps.popleft()

    def energy_at(self, time_s: float, power_w: float) -> float:
        """Joules from opening to a time; readings in the order of time never fall.

        Args:
            time_s: Not further back than HISTORY_S.
            power_w: Fills in the time since the last jump.
        """
        last_s, last_j = self._jumps[-1]
        since_s = time_s - last_s
        energy_j = last_j + power_w * since_s if since_s >= 0 else self._between_jumps(time_s)
        self._seen_j = max(self._seen_j, energy_j - self._opening_j)
        return self._seen_j

    def _between_jumps(self, time_s: float) -> float:
        later_s, later_j = self._jumps[-1]
        for earlier_s, earlier_j in reversed(self._jumps):
            if earlier_s <= time_s:
                share = (time_s - earlier_s) / (later_s - earlier_s) if later_s > earlier_s else 0.0
                return earlier_j + share * (later_j - earlier_j)
            later_s, later_j = earlier_s, earlier_j
        return later_j


class PowerTrace:
    """A power reading integrated by trapezoids; time without samples is counted, and left out.

    Attributes:
        energy_j: Over the covered time, in joules.
        covered_s: Time between samples that are close enough.
        missing_s: Time between samples that are too far apart.
        last_w: The newest reading; 0 before the first.
    """

    def __init__(self, time_s: float, power_w: float | None, *, gap_s: float = GAP_S) -> None:
        self._gap_s = gap_s
        self._last_s = time_s
        self._has_reading = power_w is not None
        self.last_w = power_w or 0.0
        self.energy_j = self.covered_s = self.missing_s = 0.0

    def add(self, time_s: float, power_w: float | None) -> bool | None:
        """Take a sample, None where the device gave no reading.

        Returns:
            Whether the time since the last reading is covered; None while that is open.
        """
        if power_w is None:
            return None
        elapsed_s = time_s - self._last_s
        covered = self._has_reading and elapsed_s <= self._gap_s
        if covered:
            self.energy_j += (self.last_w + power_w) / 2 * elapsed_s
            self.covered_s += elapsed_s
        else:
            self.missing_s += elapsed_s
        self._last_s, self.last_w, self._has_reading = time_s, power_w, True
        return covered

    def missing_until(self, time_s: float) -> float:
        """Seconds without samples up to a time, those since the last reading included."""
        open_s = time_s - self._last_s
        return self.missing_s + (open_s if open_s > self._gap_s else 0.0)

    def bridged_j(self, time_s: float) -> float:
        """Joules from the last reading to a time, at that reading."""
        return self.last_w * (time_s - self._last_s)


class DeviceTrace:
    """A device with a counter, and its power beside it: two instruments over the same time.

    Attributes:
        counter: The counter.
        power: The power.
        compared_j: What the counter counted while the power was covered.
    """

    def __init__(self, name: str, time_s: float, counter_j: float, power_w: float | None) -> None:
        self.counter = CounterTrace(name, time_s, counter_j)
        self.power = PowerTrace(time_s, power_w)
        self.compared_j = 0.0
        self._compared_from_j = counter_j

    def add(self, time_s: float, counter_j: float, power_w: float | None) -> None:
        """Take a sample of both. Raises EnergyMeterError as CounterTrace.add does."""
        self.counter.add(time_s, counter_j)
        covered = self.power.add(time_s, power_w)
        if covered:
            self.compared_j += counter_j - self._compared_from_j
        if covered is not None:
            self._compared_from_j = counter_j

    def energy_at(self, time_s: float) -> float:
        """Joules from opening to a time."""
        return self.counter.energy_at(time_s, self.power.last_w)
