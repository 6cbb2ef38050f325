"""Energy of the whole job: one meter on each machine, summed over machines."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe.config.schema import EnergySection
from moe.metering.boundaries import Level, Surroundings, stack_levels
from moe.metering.choose import choose_meter
from moe.metering.command_meter import CommandMeter
from moe.metering.energy import (
    VALIDITIES,
    Audit,
    Boundary,
    EnergyMeter,
    EnergyMeterError,
    EnergyReading,
    Source,
    Validity,
)
from moe.metering.estimate import PowerModel, server_power_model
from moe.metering.over_machines import (
    node_level,
    spread_of,
    steps_of_starts,
    sum_of_checks,
    too_coarse,
)
from moe.metering.report import Energy
from moe.metering.trace_file import TRACE_FOLDER, TraceWriter
from moe.ranks import on_every_rank


@dataclass(frozen=True)
class _Opened:
    """What the meter of one machine says of itself."""

    source: Source
    boundary: Boundary
    description: str
    idle_w: float | None
    devices: tuple[str, ...]
    node: str | None


@dataclass(frozen=True)
class _Closing:
    """What the meters of one machine say at the end."""

    audit: Audit
    device_j: tuple[float, ...]
    node: Audit | None
    step_j: float  # of the counter of each, 0 where it is no operator's
    node_step_j: float


class JobEnergy:
    """Cumulative joules of all machines since it was opened. Every method but `close` is collective.

    Attributes:
        source, boundary, description, idle_w: As a meter's; the weakest machine speaks for the sum.
        validity: Of all that was read so far.
        node_j: What instruments of whole machines have counted, at the last read; NaN without them.
        step_j, node_step_j: Largest steps of operators' counters at the last read, summed over machines, for
            `report` of a later start; 0 without such a counter, infinite where one has not moved.
        num_gpus, num_machines: Of this start.
    """

    def __init__(
        self,
        settings: EnergySection,
        device: torch.device,
        note: Callable[[str], None],
        *,
        run_dir: Path | None = None,
    ) -> None:
        """Open the meters of each machine.

        Args:
            settings: which meter, and the constants of an estimate.
            device: of this rank.
            note: told when a meter of this machine fails during the run.
            run_dir: where samples are kept, if the settings want that.

        Raises:
            InputError: the meter that the config names cannot run on a machine.
        """
        self._device = device
        self._note = note
        self._settings = settings
        self._opened_s = time.monotonic()
        host, gpu = socket.gethostname(), _gpu_name(device)
        members = on_every_rank(lambda: (host, os.getpid(), gpu))
        here = [member for member in members if member[0] == host]
        self._reads_here = here[0][1] == os.getpid()  # the first rank of a machine reads for all of it
        self.num_machines = len({member[0] for member in members})
        self.num_gpus = len({member[::2] for member in members if member[2]})
        self._writer: TraceWriter | None = None
        if settings.record and run_dir is not None and self._reads_here:
            self._writer = TraceWriter(run_dir / TRACE_FOLDER / f"{host}-{time.time_ns()}.jsonl")
        self._meter: EnergyMeter | None = None
        self._node_meter: CommandMeter | None = None
        pids, gpus = [member[1] for member in here], [member[2] for member in here if member[2]]
        self._opened = [
            item for item in on_every_rank(lambda: self._open_here(pids, gpus)) if item is not None
        ]
        weakest = min(self._opened, key=lambda item: item.source != "estimated")
        self.source, self.boundary = weakest.source, weakest.boundary
        self.estimated = self.source == "estimated"
        self.description = "; ".join(dict.fromkeys(item.description for item in self._opened))
        idle_w = [item.idle_w for item in self._opened if item.idle_w is not None]
        self.idle_w = sum(idle_w) if len(idle_w) == len(self._opened) else None
        self.failure: str | None = None
        self._node_failed = False
        self.validity: Validity = "unchecked"
        self.node_j = math.nan if self._opened[0].node is None else 0.0
        self.step_j = self.node_step_j = 0.0

    def read_j(self) -> float:
        """Joules since opening, over all machines; NaN from the moment that a meter failed.

        Waits for no work of a GPU: the step before it has given its loss to the host.
        """
        steps_j = [_step_j(self._meter), _step_j(self._node_meter)]
        invalid = len({item.boundary for item in self._opened}) > 1
        unchecked = False
        if self._meter is not None:
            validity = self._meter.audit().validity
            invalid, unchecked = invalid or validity == "invalid", validity == "unchecked"
        sums = [self._read_meter(), self._read_node(), float(invalid), float(unchecked), *steps_j]
        total = torch.tensor(sums, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        energy_j, node_j, num_invalid, num_unchecked, self.step_j, self.node_step_j = total.tolist()
        self.node_j = node_j if self._opened[0].node is not None else math.nan
        level = 2 if num_invalid or math.isnan(energy_j) else int(num_unchecked > 0)
        self.validity = VALIDITIES[level]
        return float(energy_j)

    def report(
        self,
        total_j: float,
        *,
        wall_s: float | None = None,
        node_j: float | None = None,
        problem: str | None = None,
        earlier_steps_j: Sequence[tuple[float, float]] = (),
        sizes: Collection[tuple[int | None, int | None]] = (),
    ) -> Energy:
        """The energy part of report.json.

        Args:
            total_j: joules of the run over all its starts; NaN if a meter failed.
            wall_s: seconds that it took, for what is added as constant power for each GPU of this start;
                None is since opening.
            node_j: joules of whole machines over all starts, where they are measured.
            problem: why the sum over all starts is not to be quoted.
            earlier_steps_j: step_j and node_step_j of each earlier start; NaN where they were not kept.
            sizes: GPUs and machines of the starts; where they differ, what is added for each GPU is unknown.
        """
        closing = [item for item in on_every_rank(self._close_here) if item is not None]
        last_j = (sum(item.step_j for item in closing), sum(item.node_step_j for item in closing))
        unsure_j, node_unsure_j = map(steps_of_starts, zip(*earlier_steps_j, last_j, strict=True))
        problem = problem or too_coarse(unsure_j, total_j)
        audit = self._audit([item.audit for item in closing], total_j, problem)
        inner = Level(
            boundary=self.boundary,
            basis="estimated" if self.estimated else "measured",
            source=self.description,
            energy_j=total_j,
        )
        around = Surroundings(
            num_gpus=self.num_gpus,
            num_machines=self.num_machines,
            wall_s=time.monotonic() - self._opened_s if wall_s is None else wall_s,
            host_w_per_gpu=self._settings.host_w_per_gpu,
            fabric_w_per_gpu=self._settings.fabric_w_per_gpu,
            pue=self._settings.pue,
            pue_source=self._settings.pue_source,
            gpus_vary=len({num_gpus for num_gpus, _ in sizes}) > 1,
            machines_vary=len({num_machines for _, num_machines in sizes}) > 1,
        )
        nodes = [item.node for item in closing if item.node is not None]
        node_j = self.node_j if node_j is None else node_j
        node = node_level(self._opened[0].node, nodes, node_j, unsure_j=node_unsure_j)
        return Energy(
            source=self.source,
            boundary=self.boundary,
            description=self.description,
            total_j=total_j,
            idle_w=self.idle_w,
            validity=audit.validity,
            validity_detail=audit.detail,
            cross_check=sum_of_checks([item.audit for item in closing]),
            spread=spread_of([item.devices for item in self._opened], [item.device_j for item in closing]),
            levels=stack_levels(inner, around, node=node),
        )

    def close(self) -> None:
        """Release the meters of this machine."""
        for meter in (self._meter, self._node_meter):
            if meter is not None:
                meter.close()
        if self._writer is not None:
            self._writer.close()
            if self._writer.problem is not None:
                self._note(f"energy.record: {self._writer.problem}")

    def _open_here(self, pids: Sequence[int], gpus: Sequence[str]) -> _Opened | None:
        if not self._reads_here:
            return None
        settings = self._settings
        self._meter = meter = choose_meter(
            settings.meter,
            gpu_uuids=gpus,
            pids=pids,
            power_model=_power_model(settings, num_gpus=len(set(gpus))),
            command=settings.node_command,
            record=self._writer,
        )
        if settings.node_command and meter.source != "command":
            self._node_meter = CommandMeter(settings.node_command)
        return _Opened(
            source=meter.source,
            boundary=meter.boundary,
            description=meter.description,
            idle_w=meter.idle_w,
            devices=meter.devices,
            node=None if self._node_meter is None else self._node_meter.description,
        )

    def _read_meter(self) -> float:
        if self._meter is None or self.failure is not None:
            return 0.0 if self.failure is None else math.nan
        try:
            return self._meter.read().energy_j
        except EnergyMeterError as error:
            self.failure = str(error)
            self._note(f"the energy of this run is unknown from here on: {error}")
            return math.nan

    def _read_node(self) -> float:
        if self._node_meter is None or self._node_failed:
            return math.nan if self._node_failed else 0.0
        try:
            return self._node_meter.read().energy_j
        except EnergyMeterError as error:
            self._node_failed = True
            self._note(f"the energy of whole machines is unknown from here on: {error}")
            return math.nan

    def _close_here(self) -> _Closing | None:
        if self._meter is None:
            return None
        meter, node_meter = self._meter, self._node_meter
        # Steps before audits: a meter that fails in between is 0 joules unsure only where its audit says so.
        step_j, node_step_j = _step_j(meter), _step_j(node_meter)
        node = None if node_meter is None else node_meter.audit()
        try:
            reading = meter.read()
        except EnergyMeterError as error:
            failure = self.failure or str(error)
            return _Closing(Audit(validity="invalid", detail=failure), (), node, 0.0, node_step_j)
        return _Closing(meter.audit(), _told_apart(reading, meter), node, step_j, node_step_j)

    def _audit(self, audits: Sequence[Audit], total_j: float, problem: str | None) -> Audit:
        boundaries = {item.boundary for item in self._opened}
        if len(boundaries) > 1:
            detail = f"machines measure different things: {', '.join(sorted(boundaries))}"
            return Audit(validity="invalid", detail=detail)
        worst = max(audits, key=lambda audit: VALIDITIES.index(audit.validity))
        if worst.validity == "invalid":
            return worst
        if not math.isfinite(total_j):
            problem = problem or "a meter failed during an earlier start of the run"
        return worst if problem is None else Audit(validity="invalid", detail=problem)


def _step_j(meter: EnergyMeter | CommandMeter | None) -> float:
    """Of an operator's counter; 0 of one that failed, whose audit says so."""
    if not isinstance(meter, CommandMeter):
        return 0.0
    try:
        return meter.step_j()
    except EnergyMeterError:
        return 0.0


def _told_apart(reading: EnergyReading, meter: EnergyMeter) -> tuple[float, ...]:
    return reading.device_j if len(reading.device_j) == len(meter.devices) else ()


def _gpu_name(device: torch.device) -> str:
    """How a meter finds this rank's GPU, whatever CUDA_VISIBLE_DEVICES says; empty on a CPU."""
    if device.type != "cuda":
        return ""
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        return str(properties.uuid)
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def _power_model(settings: EnergySection, num_gpus: int) -> PowerModel:
    return server_power_model(
        os.cpu_count() or 1,
        idle_w_per_cpu=settings.idle_w_per_cpu,
        full_w_per_cpu=settings.full_w_per_cpu,
        gpu_w=settings.gpu_w * num_gpus,
    )
