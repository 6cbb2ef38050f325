"""The samples of a meter in a file, and the meter that replays them, to audit a run again.

JSON lines. The first says what was sampled, each other is one sample:

    {"devices": ["GPU-..."], "source": "nvml_counter", "power_boundary": "gpu"}
    {"time_s": 12.06, "devices": {"GPU-...": {"energy_j": 1234.5, "power_w": 512.0}}}

`energy_j` is the device's counter as read, left out where there is none; `power_w` is null where the device
gave no reading. A run writes such files into its folder `energy_trace` if energy.record is set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TextIO

from moe.errors import InputError
from moe.metering.banks import Bank, CounterBank, PowerBank
from moe.metering.energy import Audit, Boundary, EnergyMeterError, EnergyReading, Source
from moe.metering.sampling import Sample

TRACE_FOLDER = "energy_trace"


class TraceWriter:
    """Writes the samples of one meter; given to it as its recorder.

    A file that can no longer be written ends the recording, not the metering.

    Attributes:
        problem: Why nothing, or not everything, was recorded; None if all was.
    """

    def __init__(self, path: Path) -> None:
        """Make the writer; the file is made when there is something to record."""
        self._path = path
        self._file: TextIO | None = None
        self._devices: tuple[str, ...] = ()
        self.problem: str | None = "this meter has no samples to record; a GPU meter has"

    def begin(self, *, devices: tuple[str, ...], source: Source, power_boundary: Boundary) -> None:
        """Write the first line."""
        self._devices = devices
        self.problem = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8")
        except OSError as error:
            self.problem = f"{self._path} cannot be written: {error.strerror}"
        self._write({"devices": devices, "source": source, "power_boundary": power_boundary})

    def take(self, sample: Sample) -> None:
        """Write one sample; it reaches the disk in blocks, so a crash loses the last seconds."""
        devices: dict[str, dict[str, float | None]] = {}
        for index, name in enumerate(self._devices):
            counter = {"energy_j": sample.counter_j[index]} if sample.counter_j else {}
            devices[name] = {**counter, "power_w": sample.power_w[index]}
        self._write({"time_s": sample.time_s, "devices": devices})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._attempt(self._file.close)
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        file = self._file
        if file is not None and self.problem is None:
            self._attempt(lambda: file.write(json.dumps(line) + "\n"))

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            self.problem = f"{self._path} cannot be written: {error.strerror}"


class ReplayMeter:
    """A meter that reads a recorded trace up to what its clock says."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = lambda: math.inf) -> None:
        """Open the trace.

        Args:
            path: The file.
            clock: Seconds on the clock of the trace; the default is its end.

        Raises:
            InputError: The file is missing or is no trace.
        """
        self._clock = clock
        self._lines = _read_lines(path)
        header, first = next(self._lines, {}), next(self._lines, {})
        try:
            self.devices = tuple(header["devices"])
            self.source: Source = header["source"]
            power_boundary: Boundary = header["power_boundary"]
            sample = _sample(first, self.devices)
            counts = bool(sample.counter_j)
            self.boundary: Boundary = "gpu" if counts else power_boundary
            self._bank: Bank = (
                CounterBank(self.devices, sample, power_boundary)
                if counts
                else PowerBank(self.devices, sample)
            )
        except (KeyError, TypeError, EnergyMeterError) as error:
            raise InputError(f"{path} is no trace of a meter: {error!r}") from error
        self._next = next(self._lines, None)
        self._failure: EnergyMeterError | None = None
        self.idle_w = None if None in sample.power_w else sum(watts or 0.0 for watts in sample.power_w)
        self.description = f"replayed from {path}: {self.source} of {', '.join(self.devices)}"

    def read(self) -> EnergyReading:
        """Return the joules from the first sample to the clock's time.

        Raises:
            EnergyMeterError: The recorded readings are not believable up to there.
            InputError: A line up to there is not JSON.
        """
        return self._bank.reading(self._advance())

    def audit(self) -> Audit:
        """Audit the trace up to the clock's time."""
        try:
            return self._bank.audit(self._advance())
        except EnergyMeterError as error:
            return Audit(validity="invalid", detail=str(error))

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _advance(self) -> float:
        """Take the samples up to now, which ends with the trace."""
        now_s = self._clock()
        while self._failure is None and self._next is not None and self._next["time_s"] <= now_s:
            try:
                self._bank.take(_sample(self._next, self.devices))
            except EnergyMeterError as error:
                self._failure = error
            self._next = next(self._lines, None)
        if self._failure is not None:
            raise self._failure
        return now_s if math.isfinite(now_s) else self._bank.sampled_s


def _read_lines(path: Path) -> Generator[dict[str, Any], None, None]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith("\n"):  # cut short by a crash
                    return
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}, line {number} is not JSON: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _sample(line: dict[str, Any], devices: tuple[str, ...]) -> Sample:
    read = [line["devices"][name] for name in devices]
    counters_j = tuple(values["energy_j"] for values in read if "energy_j" in values)
    return Sample(line["time_s"], counters_j, tuple(values["power_w"] for values in read))
