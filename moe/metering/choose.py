"""Picks the energy meter of a run: the best one that works, or exactly the one that was named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from moe.errors import InputError
from moe.metering.energy import EnergyMeter
from moe.metering.estimate import EstimatedMeter, PowerModel
from moe.metering.nvml import NvmlCounterMeter, NvmlPowerMeter
from moe.metering.rapl import POWERCAP_ROOT, RaplMeter

MeterKind = Literal["auto", "nvml", "rapl", "estimate"]


def choose_meter(
    kind: MeterKind,
    *,
    gpu_uuids: Sequence[str],
    pids: Sequence[int],
    power_model: PowerModel,
    nvml: Any = None,
    powercap_root: Path = POWERCAP_ROOT,
) -> EnergyMeter:
    """Open the meter of one machine; one process a machine (local rank 0) does this.

    `auto` takes NVML where the job uses GPUs, else RAPL, else the estimate; the meter's `description` says
    which it was and why no better one.

    Args:
        kind: The meter wanted; a named one is used or refused, never replaced.
        gpu_uuids: UUIDs of all GPUs of the job on this machine, empty on a CPU.
        pids: All processes of the job on this machine.
        power_model: The model of an estimate; its `gpu_w` must be positive for a job on GPUs.
        nvml: The `pynvml` module; None imports it.
        powercap_root: Where RAPL's counters are.

    Raises:
        InputError: The named meter cannot run here, or `auto` found none that sees the job's GPUs.
    """
    if kind == "nvml":
        return _open_nvml(gpu_uuids, nvml)
    if kind == "rapl":
        return RaplMeter(powercap_root)
    if kind == "estimate":
        return _open_estimate(power_model, pids, gpu_uuids)
    if kind == "auto":
        return _open_best(gpu_uuids, pids, power_model, nvml, powercap_root)
    raise InputError(f"energy meter {kind!r} is unknown; choose auto, nvml, rapl or estimate")


def _open_best(
    gpu_uuids: Sequence[str], pids: Sequence[int], power_model: PowerModel, nvml: Any, powercap_root: Path
) -> EnergyMeter:
    # RAPL sees no GPU, so on GPUs it would leave out most of the energy without saying so.
    try:
        return _open_nvml(gpu_uuids, nvml) if gpu_uuids else RaplMeter(powercap_root)
    except InputError as error:
        why_not_measured = str(error)
    try:
        meter = _open_estimate(power_model, pids, gpu_uuids)
    except InputError as error:
        raise InputError(f"{why_not_measured}. {error}") from error
    meter.description += f"; not measured because {why_not_measured}"
    return meter


def _open_nvml(gpu_uuids: Sequence[str], nvml: Any) -> EnergyMeter:
    nvml = nvml or _import_nvml()
    try:
        return NvmlCounterMeter(nvml, gpu_uuids)
    except InputError as error:
        why_no_counter = str(error)
    meter = NvmlPowerMeter(nvml, gpu_uuids)
    meter.description += f"; integrated because {why_no_counter}"
    return meter


def _import_nvml() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise InputError("the NVML meter needs `pip install nvidia-ml-py`") from error
    return pynvml


def _open_estimate(power_model: PowerModel, pids: Sequence[int], gpu_uuids: Sequence[str]) -> EstimatedMeter:
    if gpu_uuids and power_model.gpu_w <= 0:
        raise InputError(
            f"an estimate for {len(gpu_uuids)} GPU(s) needs their power: set the power model's gpu_w "
            "(their board power limit, in watts, is an upper bound)"
        )
    return EstimatedMeter(power_model, pids)
