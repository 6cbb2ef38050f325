"""What share of a GPU's peak FLOP per joule training reaches, always with the basis of that peak."""

from __future__ import annotations

import re

from benchmarks.tokens_per_joule_record import PeakShare
from moe.planner.hardware import GPUS, Gpu

# Boards with other clocks, memory and power limits than those of the table, and parts of a GPU.
OTHER_BOARDS = {"pcie", "nvl", "mig"}
# fp32 products run as TF32 (moe.planner.hardware).
_IN_WORDS = {"fp32": "TF32"}


def of_peak(device: str, model_flop_per_j: float, precisions: tuple[str, ...]) -> list[PeakShare]:
    """One share for each precision in use; none for a device without a data sheet, such as a CPU.

    Args:
        device: as CUDA calls it.
        model_flop_per_j: measured.
        precisions: of GPU.peak_flops.
    """
    gpu = gpu_of(device)
    return [] if gpu is None else [_share(gpu, model_flop_per_j, each) for each in precisions]


def gpu_of(device: str) -> Gpu | None:
    """The planner's constants of a GPU by a word of its CUDA name; None for another board of that chip."""
    words = set(re.split(r"[^a-z0-9]+", device.lower()))
    names = [] if words & OTHER_BOARDS else [name for name in GPUS if name in words]
    return GPUS[names[0]] if names else None


def _share(gpu: Gpu, model_flop_per_j: float, precision: str) -> PeakShare:
    peak = gpu.peak_flops[precision] / gpu.tdp_w
    name, tflops = _IN_WORDS.get(precision, precision), gpu.peak_flops[precision] / 1e12
    return PeakShare(
        percent=100 * model_flop_per_j / peak,
        peak_flop_per_j=peak,
        basis=(
            f"{gpu.name}: dense {name} peak of {tflops:g} TFLOP/s over the "
            f"board's {gpu.tdp_w:g} W (moe.planner.hardware)"
        ),
    )


def precisions_in_use(precision: str, expert_precision: str) -> tuple[str, ...]:
    """Names of peaks: of the wide products, and of the experts' if they are quantised."""
    narrow = {"fp8": "fp8", "fp8_power_of_two": "fp8", "mxfp8": "mxfp8"}.get(expert_precision)
    return (precision,) if narrow is None else (precision, narrow)
