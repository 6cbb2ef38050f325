"""What every energy meter is: the protocol, its vocabulary and its error.

A figure of energy is worthless without two labels, which every meter carries:

`source`, how the joules were obtained
    nvml_counter  the GPU's own energy counter
    nvml_power    the GPU's power reading, integrated over time
    rapl          the processor's own energy counter
    estimated     a power model, nothing was measured

`boundary`, what the joules include
    gpu               GPU boards (die, memory, voltage regulators), nothing else of the machine
    cpu_package       processor packages
    cpu_package_dram  processor packages and their memory
    node              a whole machine
    fabric            nodes and the network between them
    facility          everything at the site's electricity meter

All energy is gross: idle power is reported beside it and never subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from moe.errors import MoeError

Source = Literal["nvml_counter", "nvml_power", "rapl", "estimated"]
Boundary = Literal["gpu", "cpu_package", "cpu_package_dram", "node", "fabric", "facility"]


class EnergyMeterError(MoeError):
    """A meter stopped giving believable readings. A meter raises this rather than report zero joules."""


@dataclass(frozen=True)
class EnergyReading:
    """One look at a meter.

    Attributes:
        time_s: When, in seconds of the monotonic clock.
        energy_j: Joules since the meter opened.
    """

    time_s: float
    energy_j: float


class EnergyMeter(Protocol):
    """Counts the joules of this job on this machine from the moment it is made.

    Attributes:
        source: How the joules are obtained.
        boundary: What they include.
        description: One sentence for a person: the devices, and of an estimate every constant.
        idle_w: Power before the work began, in watts; None where the meter cannot tell.
    """

    source: Source
    boundary: Boundary
    description: str
    idle_w: float | None

    def read(self) -> EnergyReading:
        """Return the joules since the meter opened. Raises EnergyMeterError where they are not believable."""
        ...

    def close(self) -> None:
        """Release the meter; it cannot be read again."""
        ...
