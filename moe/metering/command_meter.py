"""Joules of a whole machine from whatever the operator can read: a program that prints watts or joules.

The program is an argv list (no shell), started once a second on each machine, as MLPerf's rules ask. It ends
within ten seconds and prints one line: `6512.5 W`, or `123456789 J` of a counter that only grows. A BMC, PDU
or a wall meter takes a few lines of script; moe.metering.node_readers has two for Redfish and IPMI. Only such
an instrument sees CPUs, NICs, NVSwitches, fans and the loss of power supplies.
"""

from __future__ import annotations

import math
import re
import subprocess
import time
from collections.abc import Callable, Sequence

from moe.errors import InputError
from moe.metering.cross_check import audit_power
from moe.metering.device_trace import PowerTrace
from moe.metering.energy import Audit, Boundary, EnergyMeterError, EnergyReading, Source
from moe.metering.sampling import BackgroundSampler

PERIOD_S = 1.0
TIMEOUT_S = 10.0
# A BMC may take seconds to answer, and averages about as long.
GAP_S = 5.0
# A counter of whole kWh moves every ten minutes at 6 kW.
COUNTER_STALL_S = 900.0
_LINE = re.compile(r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?) ?([WJ])")


class CommandMeter:
    """Joules of this machine, as a program of the operator reads them."""

    source: Source = "command"

    def __init__(
        self,
        argv: Sequence[str],
        *,
        boundary: Boundary = "node",
        period_s: float = PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the first reading and start the thread.

        Args:
            argv: The program and its arguments.
            boundary: What its figure includes.
            period_s: Seconds between two starts of it.
            clock: Monotonic seconds.

        Raises:
            InputError: The program is missing, fails, or prints no watts or joules.
        """
        self._argv = list(argv)
        self._clock = clock
        self.boundary = boundary
        self.devices: tuple[str, ...] = ()
        try:
            value, self._unit = self._ask()
        except EnergyMeterError as error:
            raise InputError(f"energy.node_command does not work: {error}") from error
        self._opened_s = self._last_s = self._moved_s = clock()
        self._opening_j = self._last_j = value if self._unit == "J" else 0.0
        self._largest_step_j = 0.0
        self._trace = PowerTrace(self._opened_s, value if self._unit == "W" else None, gap_s=GAP_S)
        self._bridged_j = 0.0
        self.idle_w: float | None = value if self._unit == "W" else None
        how = "its counter" if self._unit == "J" else f"power every {period_s:g} s, integrated"
        self.description = f"measured by `{' '.join(self._argv)}`: {how}; boundary {boundary}"
        self._sampler = BackgroundSampler(self._ask, self._take, period_s=period_s)

    def read(self) -> EnergyReading:
        """Return the joules up to the newest answer, carried on to now where the program gives watts.

        Raises:
            EnergyMeterError: The program failed, or its counter fell.
        """
        return self._sampler.call(self._reading)

    def audit(self) -> Audit:
        """Say whether answers are missing; there is no second instrument."""
        try:
            return self._sampler.call(self._judge)
        except EnergyMeterError as error:
            return Audit(validity="invalid", detail=str(error))

    def step_j(self) -> float:
        """Largest step of the counter since this meter was opened, by which its joules are unsure.

        0 where the program gives watts, infinite where a counter has not moved. What other starts of a run
        saw: moe.metering.over_machines.steps_of_starts.

        Raises:
            EnergyMeterError: as `read`.
        """
        return self._sampler.call(lambda: 0.0 if self._unit == "W" else self._largest_step_j or math.inf)

    def close(self) -> None:
        """Stop the thread; waits for the program at most TIMEOUT_S."""
        self._sampler.close()

    def _reading(self) -> EnergyReading:
        if self._unit == "J":
            return EnergyReading(time_s=self._last_s, energy_j=self._last_j - self._opening_j)
        now_s = self._clock()
        energy_j = self._trace.energy_j + self._bridged_j + self._trace.bridged_j(now_s)
        return EnergyReading(time_s=now_s, energy_j=energy_j)

    def _judge(self) -> Audit:
        now_s = self._clock()
        if self._unit == "W":
            name = f"`{self._argv[0]}`"
            return audit_power([(name, self._trace)], now_s=now_s, opened_s=self._opened_s)
        if now_s - self._moved_s > COUNTER_STALL_S:
            detail = f"the counter of `{self._argv[0]}` stands still since {now_s - self._moved_s:.0f} s"
            return Audit(validity="invalid", detail=detail)
        return Audit(validity="unchecked", detail="the operator's counter alone; no second instrument")

    def _take(self, answer: tuple[float, str]) -> None:
        value, unit = answer
        now_s = self._clock()
        if unit != self._unit:
            raise EnergyMeterError(f"`{self._argv[0]}` changed from {self._unit} to {unit}")
        if unit == "W":
            bridge_j = self._trace.bridged_j(now_s)
            if not self._trace.add(now_s, value):
                self._bridged_j += bridge_j
        elif value < self._last_j:
            raise EnergyMeterError(f"the counter of `{self._argv[0]}` fell from {self._last_j} to {value} J")
        elif value > self._last_j:
            self._largest_step_j = max(self._largest_step_j, value - self._last_j)
            self._last_j, self._moved_s = value, now_s
        self._last_s = now_s

    def _ask(self) -> tuple[float, str]:
        try:
            done = subprocess.run(
                self._argv,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EnergyMeterError(f"`{' '.join(self._argv)}`: {error}") from error
        if done.returncode != 0:
            raise EnergyMeterError(
                f"`{' '.join(self._argv)}` ended with {done.returncode}: {done.stderr.strip()[-200:]}"
            )
        match = _LINE.fullmatch(done.stdout.strip())
        if match is None or float(match[1]) == 0:
            raise EnergyMeterError(
                f"`{' '.join(self._argv)}` printed {done.stdout.strip()[:80]!r}; "
                "expected one line such as `6512.5 W` or `123456789 J`, not zero"
            )
        return float(match[1]), match[2]
