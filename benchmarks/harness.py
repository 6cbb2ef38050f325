"""What every benchmark shares: timing in turns, the stamp of where a number comes from, result files."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch

from moe.durable import write_atomically

MIN_REPEATS = 5
BAD_INPUT = 2  # exit code, as of the command line
# More than twice the L2 cache of an H200 (50 MB) or a B200 (126 MB).
FLUSH_BYTES = 256 * 2**20
# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

Name = TypeVar("Name")
Mark = Callable[[], None]
# Calls its argument at the end of each part that is timed.
Step = Callable[[Mark], object]
# For each call of a step, the milliseconds of its parts.
Samples = list[tuple[float, ...]]


def whole(call: Callable[[], object]) -> Step:
    """A step of one part."""

    def step(mark: Mark) -> None:
        call()
        mark()

    return step


def time_interleaved_ms(
    steps: Mapping[Name, Step], *, budget_s: float, device: str, keep_freed: bool = True
) -> dict[Name, Samples]:
    """Milliseconds of the parts of each step.

    The steps take turns, so that a noisy machine is noisy for all of them.

    Args:
        steps: by name; each is called once before it is timed.
        budget_s: seconds for all of them together; each runs at least MIN_REPEATS times.
        device: `cuda` times by events on the GPU, whose cache is emptied before each call.
        keep_freed: on a CPU, the process reuses what it frees, from here on.
    """
    if device == "cpu" and keep_freed:
        keep_freed_memory()
    lap = _cuda_lap() if device == "cuda" else _cpu_lap
    for step in steps.values():
        lap(step)
    samples: dict[Name, Samples] = {name: [] for name in steps}
    deadline_s = time.monotonic() + budget_s
    gc.collect()
    while time.monotonic() < deadline_s or min(map(len, samples.values())) < MIN_REPEATS:
        for name, step in steps.items():
            samples[name].append(lap(step))
    return samples


def keep_freed_memory() -> None:
    """Let this process reuse what it frees.

    By what was freed before, glibc gives large freed blocks back to the system or keeps them. The system's
    price for a page's first touch, which differs from moment to moment, then falls on whichever step comes
    next; it was a tenth of a layer's time on the machine of benchmarks/results. Source: mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
        if mallopt(parameter, value) != 1:
            raise RuntimeError(f"mallopt({parameter}, {value}) failed")


def _cpu_lap(step: Step) -> tuple[float, ...]:
    times_s = [time.perf_counter()]
    step(lambda: times_s.append(time.perf_counter()))
    return tuple((after - before) * 1e3 for before, after in pairwise(times_s))


def _cuda_lap() -> Callable[[Step], tuple[float, ...]]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def lap(step: Step) -> tuple[float, ...]:
        events: list[torch.cuda.Event] = []

        def mark() -> None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            events.append(event)

        flush.zero_()  # takes longer than a launch, so the GPU does not wait for Python's first one
        mark()
        step(mark)
        torch.cuda.synchronize()
        return tuple(before.elapsed_time(after) for before, after in pairwise(events))

    return lap


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """Replays the call's kernels from a CUDA graph, so that Python's launches are not timed.

    Raises:
        RuntimeError: the call waits for the GPU, which cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def require_device(device: str) -> None:
    """Leave with a message if this torch sees no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        progress(
            f"no GPU: torch {torch.__version__} sees no CUDA device here; run this on a machine with one"
        )
        sys.exit(BAD_INPUT)


def progress(text: str) -> None:
    """A line for a person, on stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def stamp(device: str) -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "device": device_name(device),
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
    }


def device_name(device: str) -> str:
    """The GPU as CUDA calls it, or the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else _cpu_name()


def _commit() -> str | None:
    described = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_json(path: Path, result: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Replace a result file in one step."""
    write_atomically(path, json.dumps(result, indent=1) + "\n")
