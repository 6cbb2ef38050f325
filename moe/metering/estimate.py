"""Energy where nothing can be measured: a stated power model, always labelled an estimate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe.metering.energy import Audit, Boundary, EnergyReading, Source

if TYPE_CHECKING:
    import psutil

# Server power per logical CPU, at the wall, idle and at full load: the averages for processors of unknown
# kind that Cloud Carbon Footprint derives from SPECpower_ssj2008 results (its AWS constants MIN_WATTS_AVG
# and MAX_WATTS_AVG, read on 2026-11-23; https://www.cloudcarbonfootprint.org/docs/methodology).
SERVER_IDLE_W_PER_CPU = 0.74
SERVER_FULL_W_PER_CPU = 3.5


@dataclass(frozen=True, kw_only=True)
class PowerModel:
    """Watts of this job on one machine = idle_w + active_w_per_core x busy cores + gpu_w.

    Attributes:
        idle_w: The machine's idle power charged to the job, in watts.
        active_w_per_core: What one fully busy logical CPU adds, in watts (joules per CPU second).
        gpu_w: Constant power of the job's GPUs on this machine, in watts; 0 where it uses none.
        provenance: Where the constants come from, in words.
    """

    idle_w: float
    active_w_per_core: float
    gpu_w: float = 0.0
    provenance: str


def server_power_model(
    num_cpus: int,
    *,
    idle_w_per_cpu: float = SERVER_IDLE_W_PER_CPU,
    full_w_per_cpu: float = SERVER_FULL_W_PER_CPU,
    gpu_w: float = 0.0,
) -> PowerModel:
    """Return the model of a server of `num_cpus` logical CPUs; without other constants, of an average one.

    Args:
        num_cpus: Logical CPUs of the machine.
        idle_w_per_cpu: Watts of the idle server for each logical CPU.
        full_w_per_cpu: Watts of the fully busy server for each logical CPU.
        gpu_w: Constant watts of all GPUs of the job on this machine.
    """
    average = (idle_w_per_cpu, full_w_per_cpu) == (SERVER_IDLE_W_PER_CPU, SERVER_FULL_W_PER_CPU)
    origin = "averages of Cloud Carbon Footprint from SPECpower results" if average else "as configured"
    return PowerModel(
        idle_w=idle_w_per_cpu * num_cpus,
        active_w_per_core=full_w_per_cpu - idle_w_per_cpu,
        gpu_w=gpu_w,
        provenance=(
            f"server power for each of {num_cpus} logical CPUs, {idle_w_per_cpu:g} W idle and "
            f"{full_w_per_cpu:g} W busy, {origin}"
        ),
    )


class EstimatedMeter:
    """Joules of a power model fed with the CPU seconds that this job's processes really used."""

    source: Source = "estimated"
    boundary: Boundary = "node"
    devices: tuple[str, ...] = ()

    def __init__(
        self, model: PowerModel, pids: Sequence[int], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Open the meter.

        Args:
            model: The power model.
            pids: The job's processes on this machine. Only their own threads count: name child processes too.
            clock: Monotonic seconds.
        """
        self._model = model
        self._clock = clock
        self._cpu_times = [_CpuTime(pid) for pid in pids]
        self._open_s = clock()
        self.idle_w: float | None = model.idle_w
        gpu = f" + {model.gpu_w:g} W of GPUs" if model.gpu_w else ""
        self.description = (
            f"estimated, not measured: {model.idle_w:g} W idle + {model.active_w_per_core:g} W for each busy "
            f"logical CPU of {len(pids)} process{'es' if len(pids) > 1 else ''}{gpu} ({model.provenance})"
        )

    def read(self) -> EnergyReading:
        """Return the estimated joules since the meter opened."""
        now_s = self._clock()
        constant_w = self._model.idle_w + self._model.gpu_w
        busy_s = sum(cpu_time.used_s() for cpu_time in self._cpu_times)
        energy_j = constant_w * (now_s - self._open_s) + self._model.active_w_per_core * busy_s
        return EnergyReading(time_s=now_s, energy_j=energy_j)

    def audit(self) -> Audit:
        """Say that nothing was measured."""
        return Audit(validity="unchecked", detail="an estimate: nothing was measured")

    def close(self) -> None:
        """Do nothing: the meter holds nothing open."""


class _CpuTime:
    """CPU seconds of one process since this was made; of one that has ended, as last seen."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._gone = psutil.NoSuchProcess
        self._process: psutil.Process | None = None
        self._start_s = self._now_s = 0.0
        try:
            process = psutil.Process(pid)
            self._start_s = self._now_s = _cpu_seconds(process)
            self._process = process
        except self._gone:
            pass

    def used_s(self) -> float:
        # is_running compares start times, so a reused pid is not mistaken for the process.
        if self._process is not None and self._process.is_running():
            try:
                self._now_s = _cpu_seconds(self._process)
            except self._gone:
                self._process = None
        return self._now_s - self._start_s


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
