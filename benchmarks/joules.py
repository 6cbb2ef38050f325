"""Joules of one call, by the meter that the library itself uses: NVML's energy counter, or RAPL on a CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.harness import progress
from moe.errors import InputError
from moe.metering.choose import choose_meter
from moe.metering.energy import EnergyMeter
from moe.metering.estimate import server_power_model

NO_METER = "none"


@contextmanager
def open_meter(device: str) -> Iterator[EnergyMeter | None]:
    """The meter of the device; None, with a line on stderr, where there is none. Nothing is estimated."""
    uuids = [str(torch.cuda.get_device_properties(0).uuid)] if device == "cuda" else []
    try:
        meter = choose_meter(
            "nvml" if uuids else "rapl",
            gpu_uuids=uuids,
            pids=[os.getpid()],
            power_model=server_power_model(os.cpu_count() or 1),  # of the kind "estimate", not taken here
        )
    except InputError as error:
        progress(f"joules are not measured: {error}")
        yield None
        return
    try:
        yield meter
    finally:
        meter.close()


def joules_per_call(meter: EnergyMeter, call: Callable[[], object], *, seconds: float, device: str) -> float:
    """Mean joules of a call, repeated for so long: NVML's counter moves only every 20 to 100 ms.

    Raises:
        EnergyMeterError: the meter gives no believable reading.
    """
    call()
    wait(device)
    before_j, calls = meter.read().energy_j, 0
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        call()
        wait(device)
        calls += 1
    return (meter.read().energy_j - before_j) / calls


def wait(device: str) -> None:
    """Until all that was launched is done."""
    if device == "cuda":
        torch.cuda.synchronize()
