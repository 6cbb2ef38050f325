"""What every energy meter is: the protocol, its vocabulary and its error.

A figure of energy is worthless without three labels, which every meter carries:

`source`, how the joules were obtained
    nvml_counter  an NVIDIA GPU's own energy counter
    nvml_power    an NVIDIA GPU's power reading, integrated over time
    amd_counter   an AMD GPU's own energy counter
    rapl          the processor's own energy counter
    command       what the operator's program reads from a BMC, a PDU or a wall meter
    estimated     a power model, nothing was measured

`boundary`, what the joules include
    gpu               GPU boards (die, memory, voltage regulators), nothing else of the machine
    module            superchips whose GPU cannot be read alone (Grace): GPU, CPU and its memory
    cpu_package       processor packages
    cpu_package_dram  processor packages and their memory
    node              a whole machine
    fabric            nodes and the network between them
    facility          everything at the site's electricity meter

`validity`, whether a second instrument supports them
    checked    an independent instrument agrees
    unchecked  there is no second instrument, or it has not seen enough
    invalid    the instruments disagree, or too much is missing: not to be quoted

All energy is gross: idle power is reported beside it and never subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from moe.errors import MoeError

Source = Literal["nvml_counter", "nvml_power", "amd_counter", "rapl", "command", "estimated"]
Boundary = Literal["gpu", "module", "cpu_package", "cpu_package_dram", "node", "fabric", "facility"]
Validity = Literal["checked", "unchecked", "invalid"]

# From the best to the worst: the worst of several speaks for their sum.
VALIDITIES: tuple[Validity, ...] = ("checked", "unchecked", "invalid")


class EnergyMeterError(MoeError):
    """A meter stopped giving believable readings. A meter raises this rather than report zero joules."""


@dataclass(frozen=True)
class EnergyReading:
    """One look at a meter.

    Attributes:
        time_s: When, in seconds of the monotonic clock.
        energy_j: Joules since the meter opened.
        device_j: The same by device, in the order of the meter's `devices`; empty where it has none.
    """

    time_s: float
    energy_j: float
    device_j: tuple[float, ...] = ()


@dataclass(frozen=True)
class Audit:
    """What a second look at the joules since the meter opened says.

    Attributes:
        validity: Whether the joules may be quoted.
        detail: One sentence for a person, with both figures where there are two.
        counter_j: Joules of the instrument that is reported, over the time that both saw; None if alone.
        trace_j: Joules of the independent instrument over the same time; None where there is none.
        window_s: Seconds that both saw.
    """

    validity: Validity
    detail: str
    counter_j: float | None = None
    trace_j: float | None = None
    window_s: float = 0.0


class EnergyMeter(Protocol):
    """Counts the joules of this job on this machine from the moment it is made.

    Attributes:
        source: How the joules are obtained.
        boundary: What they include.
        description: One sentence for a person: the devices, and of an estimate every constant.
        idle_w: Power before the work began, in watts; None where the meter cannot tell.
        devices: Names of what is told apart (GPU UUIDs, RAPL zones); empty where nothing is.
    """

    source: Source
    boundary: Boundary
    description: str
    idle_w: float | None
    devices: tuple[str, ...]

    def read(self) -> EnergyReading:
        """Return the joules since the meter opened. Raises EnergyMeterError where they are not believable.

        Neither waits for the GPU nor for a counter to move: joules since its last move are filled in.
        """
        ...

    def audit(self) -> Audit:
        """Return whether a second instrument supports the joules since the meter opened; never raises."""
        ...

    def close(self) -> None:
        """Release the meter; it cannot be read again."""
        ...
