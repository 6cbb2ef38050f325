"""Joules over time while our layer runs forward and backward: what it draws, and tokens a joule.

python -m benchmarks.energy_trace --device cuda --shape 32768,2048,768,128,8 --seconds 10 --json out.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from benchmarks.bench_moe_layer import DTYPES
from benchmarks.harness import BAD_INPUT, require_device, stamp, write_json
from benchmarks.joules import open_meter, wait
from benchmarks.problem import make_problem
from benchmarks.shapes import SETS, Shape, parse_shape
from benchmarks.variants import Runner, ours
from moe.metering.energy import EnergyMeter

# NVML's counter moves every 20 to 100 ms.
PERIOD_S = 0.2
IDLE_S = 2.0


def main() -> int:
    """Parse argv, run, print; 2 where there is no meter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    parser.add_argument("--shape", type=parse_shape, default=SETS["qwen3-30b"][0], metavar="T,H,I,E,K")
    parser.add_argument("--seconds", type=float, default=10.0, help="under load")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    require_device(args.device)
    with open_meter(args.device) as meter:
        if meter is None:
            return BAD_INPUT
        result = trace(meter, args.shape, args.dtype, args.device, seconds=args.seconds)
    print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=1))
    if args.json:
        write_json(args.json, result)
    return 0


def trace(meter: EnergyMeter, shape: Shape, dtype: str, device: str, *, seconds: float) -> dict[str, object]:
    """Joules by time, first idle, then under load; tokens a joule of the load, gross.

    Raises:
        EnergyMeterError: the meter gives no believable reading.
    """
    problem = make_problem(shape, DTYPES[dtype], device)
    runner = Runner(problem, ours(problem))
    runner.step(lambda: None)
    wait(device)
    samples = [meter.read()]
    time.sleep(IDLE_S)
    samples.append(meter.read())
    calls, load_starts_s, deadline_s = 0, time.monotonic(), time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        runner.step(lambda: None)
        wait(device)
        calls += 1
        if time.monotonic() - samples[-1].time_s >= PERIOD_S:
            samples.append(meter.read())
    samples.append(meter.read())
    load_s = time.monotonic() - load_starts_s
    audit = meter.audit()
    idle_j, load_j = samples[1].energy_j - samples[0].energy_j, samples[-1].energy_j - samples[1].energy_j
    return {
        "benchmark": "energy trace",
        "shape": str(shape),
        "dtype": dtype,
        "direction": "forward+backward",
        "idle_w": idle_j / IDLE_S,
        "load_w": load_j / load_s,
        "joules": load_j / calls,
        "tokens_per_j": shape.T * calls / load_j,
        "tflops": shape.flops("forward+backward") * calls / load_s / 1e12,
        "energy_source": meter.source,
        "boundary": meter.boundary,
        "meter": meter.description,
        "audit": vars(audit),  # counter and power trace over the whole of it; too short to be judged
        "samples": [(reading.time_s - samples[0].time_s, reading.energy_j) for reading in samples],
        "stamp": stamp(device),
    }


if __name__ == "__main__":
    sys.exit(main())
