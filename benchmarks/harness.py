"""What every benchmark shares: timing, the green gate, and the stamp that says where a number comes from."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

MIN_REPEATS = 5


class WrongResultError(AssertionError):
    """A variant disagrees with the reference; it is reported, not timed."""


def require_close(name: str, found: torch.Tensor, expected: torch.Tensor, *, tolerance: float) -> None:
    """Green gate: WrongResultError if the largest error exceeds tolerance * the largest expected value."""
    error = float((found.double() - expected.double()).abs().max())
    limit = tolerance * float(expected.double().abs().max())
    if not error <= limit:
        raise WrongResultError(f"{name} is off by {error:.3g}, allowed {limit:.3g}")


def time_interleaved_ms(
    variants: Mapping[str, Callable[[], object]], *, budget_s: float, device: str
) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum milliseconds of each variant.

    The variants take turns, so that a noisy machine is noisy for all of them.

    Args:
        variants: functions to call, by name; each is called twice before it is timed.
        budget_s: seconds for all of them together; each runs at least MIN_REPEATS times.
        device: `cuda` waits for the GPU around each call.
    """
    for function in variants.values():
        function()
        function()
    samples_ms: dict[str, list[float]] = {name: [] for name in variants}
    deadline_s = time.monotonic() + budget_s
    while time.monotonic() < deadline_s or min(map(len, samples_ms.values())) < MIN_REPEATS:
        for name, function in variants.items():
            samples_ms[name].append(_once_ms(function, device))
    return {
        name: {"median_ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms), "repeats": len(ms)}
        for name, ms in samples_ms.items()
    }


def _once_ms(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start_s) * 1e3


def stamp(device: str) -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip() or None,
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result file."""
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
