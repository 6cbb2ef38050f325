"""CPU energy from the processor's own counters (RAPL), as Linux shows them under /sys/class/powercap.

AMD processors appear under the same `intel-rapl` names. Layout and units: the Linux kernel's
Documentation/power/powercap/powercap.rst.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe.errors import InputError
from moe.metering.energy import Audit, Boundary, EnergyMeterError, EnergyReading, Source
from moe.metering.sampling import BackgroundSampler

POWERCAP_ROOT = Path("/sys/class/powercap")
# The smallest common range is 2**32 x 15.3 uJ = 65.7 kJ, 131 s at 500 W: ten seconds cannot hide a turn.
WRAP_PERIOD_S = 10.0
# The counter moves every millisecond.
COUNTER_STALL_S = 2.0


@dataclass
class Zone:
    """One counter: a processor package, or the memory behind it."""

    path: Path
    name: str
    max_range_uj: int
    last_uj: int
    total_uj: int = 0
    moved_s: float = 0.0

    def read_uj(self) -> int:
        """The counter now."""
        return _read_int(self.path / "energy_uj")

    def advance(self, now_s: float, now_uj: int) -> None:
        """Add what was used since the last call, across at most one wrap of the counter."""
        delta_uj = now_uj - self.last_uj
        if delta_uj < 0:
            delta_uj += self.max_range_uj
        if delta_uj < 0:
            raise EnergyMeterError(
                f"{self.path}: the counter fell from {self.last_uj} to {now_uj} uJ, more than its range "
                f"of {self.max_range_uj} uJ"
            )
        if delta_uj > 0:
            self.moved_s = now_s
        elif now_s - self.moved_s > COUNTER_STALL_S:
            raise EnergyMeterError(
                f"{self.path}: the counter stands at {now_uj} uJ since {now_s - self.moved_s:.1f} s"
            )
        self.total_uj += delta_uj
        self.last_uj = now_uj


class RaplMeter:
    """Joules of all processor packages of this machine, and of their memory where it has a counter.

    Everything that runs on the machine is counted, not this job alone.
    """

    source: Source = "rapl"
    # The counters cannot tell idle power, and this process is never idle when it opens them.
    idle_w: float | None = None

    def __init__(self, root: Path = POWERCAP_ROOT, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Open the meter and start the thread that follows the counters across their wraps.

        Args:
            root: The powercap directory.
            clock: Monotonic seconds.

        Raises:
            InputError: There is no package counter, or this user may not read it.
        """
        self._clock = clock
        self._zones = _find_zones(root)
        self._read_s = clock()
        for zone in self._zones:
            zone.moved_s = self._read_s
        names = [zone.name for zone in self._zones]
        self.devices = tuple(zone.path.name for zone in self._zones)
        self.boundary: Boundary = "cpu_package_dram" if "dram" in names else "cpu_package"
        self.description = (
            f"measured: RAPL counters of {', '.join(names)}; the whole machine's processors, no GPU or fan"
        )
        self._sampler = BackgroundSampler(self._fetch, self._take, period_s=WRAP_PERIOD_S)

    def read(self) -> EnergyReading:
        """Return the joules of all zones since the meter opened.

        Raises:
            EnergyMeterError: A counter can no longer be read, or stands still.
        """
        return self._sampler.call(self._reading)

    def audit(self) -> Audit:
        """Say that there is no second instrument, or what failed."""
        try:
            self._sampler.call(self._reading)
        except EnergyMeterError as error:
            return Audit(validity="invalid", detail=str(error))
        return Audit(validity="unchecked", detail="RAPL counters alone; no second instrument")

    def close(self) -> None:
        """Stop the thread."""
        self._sampler.close()

    def _reading(self) -> EnergyReading:
        self._take(self._fetch())
        device_j = tuple(zone.total_uj / 1e6 for zone in self._zones)
        return EnergyReading(time_s=self._read_s, energy_j=sum(device_j), device_j=device_j)

    def _fetch(self) -> tuple[float, list[int]]:
        return self._clock(), [zone.read_uj() for zone in self._zones]

    def _take(self, sample: tuple[float, list[int]]) -> None:
        now_s, counters_uj = sample
        if now_s < self._read_s:  # a reader was faster
            return
        self._read_s = now_s
        for zone, now_uj in zip(self._zones, counters_uj, strict=True):
            zone.advance(now_s, now_uj)


def _find_zones(root: Path) -> list[Zone]:
    """Open every package zone, and every memory zone below one.

    Other zones would count joules twice: core and uncore lie inside a package, psys around it, and
    intel-rapl-mmio shows the same package again.
    """
    zones = []
    for path in sorted(root.glob("intel-rapl:*")):
        try:
            name = (path / "name").read_text(encoding="ascii").strip()
            if name.startswith("package-") or name == "dram":
                zones.append(
                    Zone(path, name, _read_int(path / "max_energy_range_uj"), _read_int(path / "energy_uj"))
                )
        except (OSError, EnergyMeterError) as error:
            raise InputError(
                f"RAPL counter {path} cannot be read ({error}); make it readable "
                f"(as root: chmod a+r {path}/energy_uj) or use the meter `estimate`"
            ) from error
    if not any(zone.name.startswith("package-") for zone in zones):
        raise InputError(
            f"there is no RAPL package counter under {root} (virtual machines rarely have one); "
            "only the meter `estimate` works here"
        )
    return zones


def _read_int(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        raise EnergyMeterError(f"{path} cannot be read: {error}") from error
