"""Tokens per joule of our layer, bf16 against FP8 products, with the counter checked against a power trace.

python -m benchmarks.bench_layer_joules --json out.json     needs a GPU, and runs for more than a minute

The two take turns in windows of seconds, forward and backward. Exit code 1: counter and trace differ by more
than 3 %, so the joules are not to be quoted, and there is no verdict.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.ab_statistics import LEAST_PAIRS, compare
from benchmarks.harness import BAD_INPUT, progress, require_device, stamp, write_json
from benchmarks.joules import open_meter, wait
from benchmarks.problem import make_problem
from benchmarks.shapes import SETS, Shape, parse_shape
from benchmarks.variants import NotHereError, Runner, Variant, ours, ours_fp8
from moe.energy.steady_state import resolution
from moe.metering.energy import Audit, EnergyMeter

# Six windows last longer than the minute that counter and trace need to be compared (metering.cross_check).
WINDOW_S = 10.5
# The order of the turns: the numerator of the ratio first, as compare() needs it.
MAKERS = {"fp8": ours_fp8, "bf16": ours}


def main() -> int:
    """Parse argv, measure, print; 2 where there is no meter, 1 where its instruments disagree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=parse_shape, default=SETS["qwen3-30b"][0], metavar="T,H,I,E,K")
    parser.add_argument("--pairs", type=int, default=LEAST_PAIRS, help="windows of each")
    parser.add_argument("--seconds", type=float, default=WINDOW_S, help="of a window")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    require_device("cuda")
    problem = make_problem(args.shape, torch.bfloat16, "cuda")
    calls: dict[str, Callable[[], object]] = {}
    for name, make in MAKERS.items():
        calls |= _call(name, partial(make, problem), problem)
    with open_meter("cuda") as meter:
        if meter is None:
            return BAD_INPUT
        result = measure(meter, calls, args.shape, pairs=args.pairs, seconds=args.seconds)
    result["stamp"] = stamp("cuda")
    print(json.dumps(result, indent=1))
    if args.json:
        write_json(args.json, result)
    return int(result["audit"]["validity"] == "invalid")


def _call(name: str, make: Callable[[], Variant], problem: Any) -> dict[str, Callable[[], object]]:
    try:
        runner = Runner(problem, make())
    except NotHereError as error:
        progress(f"{name}: left out: {error}")
        return {}
    return {name: lambda: runner.step(lambda: None)}


def measure(
    meter: EnergyMeter,
    calls: Mapping[str, Callable[[], object]],
    shape: Shape,
    *,
    pairs: int,
    seconds: float,
    device: str = "cuda",
) -> dict[str, Any]:
    """Tokens per joule of each call, in turns, and what the meter's second instrument says of all of it.

    Raises:
        EnergyMeterError: the meter gives no believable reading.
    """
    turns = [name for name in MAKERS if name in calls]
    for name in turns:
        calls[name]()
    wait(device)
    per_j: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(pairs):
        for name in turns:
            count, joules = _window(meter, calls[name], seconds=seconds, device=device)
            per_j[name].append(shape.T * count / joules)
    audit = meter.audit()
    both = pairs >= LEAST_PAIRS and turns == list(MAKERS)
    return {
        "benchmark": "layer joules",
        "shape": str(shape),
        "direction": "forward+backward",
        "tokens_per_j": per_j,
        "fp8_over_bf16": _compared(per_j, resolution(meter.source, seconds), audit) if both else None,
        "energy_source": meter.source,
        "boundary": meter.boundary,
        "meter": meter.description,
        "idle_w": meter.idle_w,
        "audit": asdict(audit),
    }


def _compared(per_j: Mapping[str, list[float]], finest: float, audit: Audit) -> dict[str, Any]:
    """FP8 over bf16; inconclusive where the meter's instruments disagree."""
    found = asdict(compare(per_j["fp8"], per_j["bf16"], resolution=finest))
    return found | ({"verdict": "inconclusive"} if audit.validity == "invalid" else {})


def _window(
    meter: EnergyMeter, call: Callable[[], object], *, seconds: float, device: str
) -> tuple[int, float]:
    """Calls and joules of one window."""
    begin_j, count, deadline_s = meter.read().energy_j, 0, time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        call()
        wait(device)
        count += 1
    return count, meter.read().energy_j - begin_j


if __name__ == "__main__":
    sys.exit(main())
