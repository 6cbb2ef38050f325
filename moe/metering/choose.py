"""Picks the energy meter of a run: the best one that works, or exactly the one that was named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

from moe.errors import InputError
from moe.metering.amd import AmdBoards
from moe.metering.command_meter import CommandMeter
from moe.metering.energy import EnergyMeter
from moe.metering.estimate import EstimatedMeter, PowerModel
from moe.metering.gpu_meter import GpuMeter
from moe.metering.nvml import NvmlBoards
from moe.metering.rapl import POWERCAP_ROOT, RaplMeter
from moe.metering.sampling import Recorder

MeterKind = Literal["auto", "nvml", "amd", "rapl", "command", "estimate"]


def choose_meter(
    kind: MeterKind,
    *,
    gpu_uuids: Sequence[str],
    pids: Sequence[int],
    power_model: PowerModel,
    command: Sequence[str] = (),
    record: Recorder | None = None,
    nvml: Any = None,
    smi: Any = None,
    powercap_root: Path = POWERCAP_ROOT,
) -> EnergyMeter:
    """Open the meter of one machine; one process a machine (local rank 0) does this.

    `auto` takes the maker's counter where the job uses GPUs; on CPUs the operator's command if there is one,
    else RAPL; the estimate where none of these works. The meter's `description` says which it was and why no
    better one.

    Args:
        kind: The meter wanted; a named one is used or refused, never replaced.
        gpu_uuids: All GPUs of the job on this machine, empty on a CPU: UUIDs of NVIDIA's, PCI addresses of
            AMD's.
        pids: All processes of the job on this machine.
        power_model: The model of an estimate; its `gpu_w` must be positive for a job on GPUs.
        command: Argv of a program that reads the whole machine; see moe.metering.command_meter.
        record: Takes every sample of a GPU meter.
        nvml: The `pynvml` module; None imports it.
        smi: The `amdsmi` module; None imports it.
        powercap_root: Where RAPL's counters are.

    Raises:
        InputError: The named meter cannot run here, or `auto` found none that sees the job's GPUs.
    """
    openers: dict[str, Callable[[], EnergyMeter]] = {
        "nvml": lambda: _open_nvml(gpu_uuids, nvml, record),
        "amd": lambda: _open_amd(gpu_uuids, smi, record),
        "rapl": lambda: RaplMeter(powercap_root),
        "command": lambda: _open_command(command),
        "estimate": lambda: _open_estimate(power_model, pids, gpu_uuids),
    }
    if kind in openers:
        return openers[kind]()
    if kind != "auto":
        raise InputError(f"energy meter {kind!r} is unknown; choose one of {', '.join(get_args(MeterKind))}")
    # RAPL sees no GPU, so on GPUs it would leave out most of the energy without saying so.
    best = _maker(gpu_uuids) if gpu_uuids else "command" if command else "rapl"
    try:
        return openers[best]()
    except InputError as error:
        why_not_measured = str(error)
    try:
        meter = openers["estimate"]()
    except InputError as error:
        raise InputError(f"{why_not_measured}. {error}") from error
    meter.description += f"; not measured because {why_not_measured}"
    return meter


def _maker(gpu_uuids: Sequence[str]) -> Literal["nvml", "amd"]:
    return "amd" if ":" in gpu_uuids[0] else "nvml"


def _open_nvml(gpu_uuids: Sequence[str], nvml: Any, record: Recorder | None) -> EnergyMeter:
    nvml = nvml or _import_nvml()
    try:
        return GpuMeter(NvmlBoards(nvml, gpu_uuids), record=record)
    except InputError as error:
        why_no_counter = str(error)
    meter = GpuMeter(NvmlBoards(nvml, gpu_uuids), "power", record=record)
    meter.description += f"; integrated because {why_no_counter}"
    return meter


def _import_nvml() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise InputError("the NVML meter needs `pip install nvidia-ml-py`") from error
    return pynvml


def _open_amd(pci_addresses: Sequence[str], smi: Any, record: Recorder | None) -> EnergyMeter:
    return GpuMeter(AmdBoards(smi or _import_smi(), pci_addresses), record=record)


def _import_smi() -> Any:
    try:
        return import_module("amdsmi")
    # The package raises these, too, where it is installed without ROCm's library.
    except (ImportError, OSError, KeyError) as error:
        raise InputError(f"the AMD meter needs ROCm's `amdsmi`, which cannot be imported: {error}") from error


def _open_command(command: Sequence[str]) -> CommandMeter:
    if not command:
        raise InputError("energy.meter=command needs energy.node_command, the program that reads the machine")
    return CommandMeter(command)


def _open_estimate(power_model: PowerModel, pids: Sequence[int], gpu_uuids: Sequence[str]) -> EstimatedMeter:
    if gpu_uuids and power_model.gpu_w <= 0:
        raise InputError(
            f"an estimate for {len(gpu_uuids)} GPU(s) needs their power: set the power model's gpu_w "
            "(their board power limit, in watts, is an upper bound)"
        )
    return EstimatedMeter(power_model, pids)
