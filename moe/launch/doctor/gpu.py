"""What NVML says about the GPUs of a node. Every function takes an open `Nvml`, so tests can give a fake.

NVML's functions and constants: NVIDIA Management Library API reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moe.launch.doctor.check import Check

# A counter that moves every 20 to 100 ms needs this long for a ratio that is good to a fifth.
ENERGY_WINDOW_S = 1.0
# Counter and power reading differ while the load changes; beyond these the counter counts something else.
ENERGY_RATIO = (0.5, 2.0)
# More than contexts of monitoring tools: a process of somebody else, or of a job that did not end.
BUSY_BYTES = 2 * 2**30
MOST_LINKS = 18  # NVLinks of one GPU, Hopper and Blackwell


@dataclass(frozen=True)
class Nvml:
    """The `pynvml` module with its session open, and the handle of every GPU."""

    module: Any
    handles: Sequence[Any]


def open_nvml(module: Any = None) -> Nvml | Check:
    """Start NVML, or the check that says why there is nothing to ask.

    Args:
        module: The `pynvml` module; None imports it.
    """
    if module is None:
        try:
            import pynvml
        except ModuleNotFoundError:
            remedy = "pip install nvidia-ml-py to have GPUs checked"
            return Check("gpu", "skipped", "no GPU was looked for: nvidia-ml-py is not installed", remedy)
        module = pynvml
    try:
        module.nvmlInit()
        handles = [module.nvmlDeviceGetHandleByIndex(i) for i in range(module.nvmlDeviceGetCount())]
    except module.NVMLError as error:
        return Check("gpu", "skipped", f"this machine shows no NVIDIA GPU ({error}); the rest is checked")
    return Nvml(module, handles)


def check_driver(nvml: Nvml) -> Check:
    """Versions of the driver and of the CUDA that it supports."""
    driver = nvml.module.nvmlSystemGetDriverVersion()
    major, minor = divmod(nvml.module.nvmlSystemGetCudaDriverVersion(), 1000)
    return Check("driver", "ok", f"{driver}, CUDA {major}.{minor // 10}")


def check_count(nvml: Nvml, visible: int, ranks: int) -> Check:
    """Whether every rank of this node has a GPU.

    Args:
        nvml: The GPUs of the machine.
        visible: GPUs that torch sees.
        ranks: Ranks of this node.
    """
    names = sorted({nvml.module.nvmlDeviceGetName(handle) for handle in nvml.handles})
    text = f"{len(nvml.handles)} x {' and '.join(names)}, {visible} visible, {ranks} rank(s)"
    if visible < ranks:
        remedy = (
            "start fewer ranks, free CUDA_VISIBLE_DEVICES, or have the node looked at: a GPU fell off its bus"
        )
        return Check("gpu count", "fail", text, remedy)
    return Check("gpu count", "ok", text)


def check_health(nvml: Nvml) -> Check:
    """Uncorrected memory errors and memory rows that wait for a reset."""
    module, ill = nvml.module, []
    kind = (module.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, module.NVML_VOLATILE_ECC)
    for index, handle in enumerate(nvml.handles):
        errors = _ask(nvml, module.nvmlDeviceGetTotalEccErrors, handle, *kind)
        if errors:
            ill.append(f"GPU {index}: {errors} uncorrected memory errors")
        rows = _ask(nvml, module.nvmlDeviceGetRemappedRows, handle)
        if rows is not None:
            _, _, pending, failed = rows
            ill += [f"GPU {index}: row remapping failed"] if failed else []
            ill += [f"GPU {index}: row remapping is pending"] if pending else []
    if ill:
        return Check("gpu health", "fail", "; ".join(ill), "reset the GPU or drain the node")
    return Check("gpu health", "ok", f"no uncorrected memory errors on {len(nvml.handles)} GPU(s)")


def check_clocks(nvml: Nvml) -> Check:
    """Clocks, temperatures and why a GPU runs slower than it could."""
    module, texts, slow = nvml.module, [], []
    bad = {
        "hardware slowdown": module.nvmlClocksEventReasonHwSlowdown,
        "hardware thermal slowdown": module.nvmlClocksEventReasonHwThermalSlowdown,
        "power brake": module.nvmlClocksEventReasonHwPowerBrakeSlowdown,
        "software thermal slowdown": module.nvmlClocksEventReasonSwThermalSlowdown,
    }
    for index, handle in enumerate(nvml.handles):
        now_mhz = module.nvmlDeviceGetClockInfo(handle, module.NVML_CLOCK_SM)
        most_mhz = module.nvmlDeviceGetMaxClockInfo(handle, module.NVML_CLOCK_SM)
        temperature_c = module.nvmlDeviceGetTemperature(handle, module.NVML_TEMPERATURE_GPU)
        texts.append(f"{now_mhz}/{most_mhz} MHz {temperature_c} C")
        reasons = module.nvmlDeviceGetCurrentClocksEventReasons(handle)
        slow += [f"GPU {index}: {name}" for name, bit in bad.items() if reasons & bit]
    if slow:
        remedy = "look at cooling and power of the node; one slow GPU slows the whole job"
        return Check("clocks", "fail", "; ".join(slow), remedy)
    return Check("clocks", "ok", "; ".join(sorted(set(texts))))


def check_free_memory(nvml: Nvml) -> Check:
    """Whether somebody else uses the GPUs."""
    used = [nvml.module.nvmlDeviceGetMemoryInfo(handle).used for handle in nvml.handles]
    busy = [f"GPU {index}: {size / 2**30:.1f} GiB" for index, size in enumerate(used) if size > BUSY_BYTES]
    if busy:
        remedy = "end the process that holds it; nvidia-smi lists it"
        return Check("gpu memory", "warn", f"in use before the run: {'; '.join(busy)}", remedy)
    return Check("gpu memory", "ok", f"at most {max(used) / 2**30:.1f} GiB in use")


def check_nvlink(nvml: Nvml) -> Check:
    """Active NVLinks of every GPU."""
    counts = [sum(_link_is_up(nvml, handle, link) for link in range(MOST_LINKS)) for handle in nvml.handles]
    if len(counts) == 1:
        return Check("nvlink", "skipped", f"one GPU, {counts[0]} link(s) up")
    text = f"{counts} link(s) up"
    if min(counts) == 0:
        remedy = "keep tensor and expert parallelism small, or look at the fabric manager of this node"
        return Check("nvlink", "warn", text, remedy)
    if min(counts) < max(counts):
        return Check("nvlink", "fail", text, "a link is down; have the node looked at")
    return Check("nvlink", "ok", text)


def _link_is_up(nvml: Nvml, handle: Any, link: int) -> bool:
    return bool(_ask(nvml, nvml.module.nvmlDeviceGetNvLinkState, handle, link))


def check_energy(nvml: Nvml, sleep: Callable[[float], None] = time.sleep) -> Check:
    """Whether the energy counters move, and at the rate that the power readings say.

    Args:
        nvml: The GPUs.
        sleep: Waits for the given seconds.
    """
    module = nvml.module
    try:
        before_mj = [module.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in nvml.handles]
        started_s = time.monotonic()
        sleep(ENERGY_WINDOW_S)
        elapsed_s = max(time.monotonic() - started_s, ENERGY_WINDOW_S)
        after_mj = [module.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in nvml.handles]
        powers_w = [module.nvmlDeviceGetPowerUsage(handle) / 1e3 for handle in nvml.handles]
    except module.NVMLError as error:
        remedy = "use energy.meter=estimate, or a GPU of the Volta generation or later"
        return Check("energy counter", "warn", f"none: {error}", remedy)
    counted_w = [
        (after - before) / 1e3 / elapsed_s for before, after in zip(before_mj, after_mj, strict=True)
    ]
    odd = [
        f"GPU {index}: the counter says {counted:.0f} W, the power reading {power:.0f} W"
        for index, (counted, power) in enumerate(zip(counted_w, powers_w, strict=True))
        if not ENERGY_RATIO[0] * power <= counted <= ENERGY_RATIO[1] * power
    ]
    if odd:
        return Check(
            "energy counter", "fail", "; ".join(odd), "do not trust this node's joules; update the driver"
        )
    return Check("energy counter", "ok", f"{sum(counted_w):.0f} W counted, {sum(powers_w):.0f} W read")


def _ask(nvml: Nvml, question: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None where this GPU does not have what was asked for."""
    try:
        return question(*arguments)
    except (nvml.module.NVMLError_NotSupported, nvml.module.NVMLError_InvalidArgument):
        return None  # the second: a link number beyond those of this GPU
