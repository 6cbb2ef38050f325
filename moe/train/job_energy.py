"""Energy of the whole job: one meter on each machine, summed over machines."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist

from moe.config.schema import EnergySection
from moe.metering.choose import choose_meter
from moe.metering.energy import Boundary, EnergyMeter, EnergyMeterError, Source
from moe.metering.estimate import PowerModel, server_power_model
from moe.metering.report import Energy
from moe.ranks import on_every_rank


class JobEnergy:
    """Cumulative joules of all machines since it was opened. Every method is collective."""

    def __init__(self, settings: EnergySection, device: torch.device, note: Callable[[str], None]) -> None:
        """Open one meter on each machine.

        Args:
            settings: which meter, and the constants of an estimate.
            device: of this rank.
            note: told when a meter of this machine fails during the run.

        Raises:
            InputError: the meter that the config names cannot run on a machine.
        """
        self._device = device
        self._note = note
        on_gpu = device.type == "cuda"
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if on_gpu else ""
        host = socket.gethostname()
        members = on_every_rank(lambda: (host, os.getpid(), uuid))
        here = [member for member in members if member[0] == host]
        self._meter: EnergyMeter | None = None

        def open_here() -> tuple[Source, Boundary, str, float | None] | None:
            if here[0][1] != os.getpid():  # the first rank of a machine reads for all of it
                return None
            self._meter = choose_meter(
                settings.meter,
                gpu_uuids=[member[2] for member in here if member[2]],
                pids=[member[1] for member in here],
                power_model=_power_model(settings, num_gpus=sum(1 for member in here if member[2])),
            )
            meter = self._meter
            return meter.source, meter.boundary, meter.description, meter.idle_w

        described = on_every_rank(open_here)
        meters = [item for item in described if item is not None]
        self.estimated = any(item[0] == "estimated" for item in meters)
        # The weakest of the machines' meters speaks for the sum.
        self.source, self.boundary, *_ = min(meters, key=lambda item: item[0] != "estimated")
        self.description = "; ".join(dict.fromkeys(item[2] for item in meters))
        idle_w = [item[3] for item in meters if item[3] is not None]
        self.idle_w = sum(idle_w) if len(idle_w) == len(meters) else None
        self.failure: str | None = None

    def read_j(self) -> float:
        """Joules since opening, over all machines; NaN from the moment that a meter failed."""
        joules = 0.0
        if self._meter is not None and self.failure is None:
            try:
                joules = self._meter.read().energy_j
            except EnergyMeterError as error:
                self.failure = str(error)
                self._note(f"the energy of this run is unknown from here on: {error}")
        if self.failure is not None:
            joules = math.nan
        total = torch.tensor([joules], dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return float(total.item())

    def report(self, total_j: float) -> Energy:
        """The energy part of report.json."""
        return Energy(
            source=self.source,
            boundary=self.boundary,
            description=self.description,
            total_j=total_j,
            idle_w=self.idle_w,
        )

    def close(self) -> None:
        """Release the meter of this machine."""
        if self._meter is not None:
            self._meter.close()


def _power_model(settings: EnergySection, num_gpus: int) -> PowerModel:
    return server_power_model(
        os.cpu_count() or 1,
        idle_w_per_cpu=settings.idle_w_per_cpu,
        full_w_per_cpu=settings.full_w_per_cpu,
        gpu_w=settings.gpu_w * num_gpus,
    )
