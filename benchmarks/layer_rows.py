"""Rows of bench_moe_layer: rates from times, joules, and the table that it prints."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.harness import Samples, Step, device_name, progress
from benchmarks.joules import NO_METER, joules_per_call, open_meter
from benchmarks.roofs import Peak, peak_of, roof_ms
from benchmarks.shapes import DIRECTIONS, Shape
from benchmarks.variants import Runner
from moe.metering.energy import EnergyMeterError

ROOF = "matmul"
NO_JOULES = {"joules": None, "tokens_per_j": None, "energy_source": NO_METER}
UNMEASURED = {
    "ms": None,
    "ms_min": None,
    "repeats": 0,
    "tflops": None,
    "ratio_to_matmul": None,
    "percent_of_roof": None,
    "roof_source": None,
    "saved_bytes": None,
    "correct": False,
    **NO_JOULES,
}

Row = dict[str, Any]
Joules = dict[tuple[str, str], dict[str, Any]]


def rates(
    shape: Shape, direction: str, samples: Samples, *, products: Samples, peak: Peak | None
) -> dict[str, float | int | str | None]:
    """Median time of a direction and what follows from it.

    Args:
        shape: what was computed.
        direction: of DIRECTIONS.
        samples: forward and backward milliseconds of each call.
        products: those of the matrix products alone.
        peak: of the GPU, if it is known.
    """
    times_ms = _direction_ms(direction, samples)
    ms = statistics.median(times_ms)
    return {
        "ms": ms,
        "ms_min": min(times_ms),
        "repeats": len(times_ms),
        "tflops": shape.flops(direction) / ms / 1e9,
        "ratio_to_matmul": statistics.median(_direction_ms(direction, products)) / ms,
        "percent_of_roof": None if peak is None else 100 * roof_ms(shape, direction, peak) / ms,
        "roof_source": None if peak is None else peak.source,
    }


def _direction_ms(direction: str, samples: Samples) -> list[float]:
    if direction == "forward+backward":
        return [sum(parts) for parts in samples]
    return [parts[DIRECTIONS.index(direction)] for parts in samples]


def peak_on(device: str, dtype: str) -> Peak | None:
    """Data sheet of the GPU at hand; None for a CPU, fp32, and a GPU that roofs.py does not know."""
    return peak_of(device_name(device)) if device == "cuda" and dtype == "bf16" else None


def layer_joules(
    steps: Mapping[str, Step], runners: Mapping[str, Runner], *, seconds: float, device: str
) -> Joules:
    """joules, tokens_per_j and energy_source by implementation and direction.

    The backward cannot run alone: its joules are those of both less the forward's. The products alone are
    measured in both directions together.
    """
    joules: Joules = {(name, direction): NO_JOULES for name in steps for direction in DIRECTIONS}
    if not seconds:
        return joules
    with open_meter(device) as meter:
        if meter is None:
            return joules
        progress(f"  joules: {meter.description}")
        try:
            for name, step in steps.items():
                both_j = joules_per_call(meter, partial(step, _no_mark), seconds=seconds, device=device)
                found_j = {"forward+backward": both_j}
                if runner := runners.get(name):
                    forward_j = joules_per_call(meter, runner.forward, seconds=seconds, device=device)
                    found_j |= {"forward": forward_j, "backward": both_j - forward_j}
                for direction, each_j in found_j.items():
                    tokens = runner.problem.shape.T if runner else 0
                    joules[name, direction] = {
                        "joules": each_j,
                        "tokens_per_j": tokens / each_j if tokens and each_j > 0 else None,
                        "energy_source": meter.source,
                    }
        except EnergyMeterError as error:
            progress(f"  joules are left out: {error}")
    return joules


def _no_mark() -> None:
    """Nothing is timed."""


def as_text(rows: Sequence[Row]) -> str:
    """All rows as a table, then the ratios of ours to the products and to each rival."""
    lines = [
        f"{'shape':24} {'dtype':5} {'impl':17} {'direction':17} {'ms':>10} {'TFLOP/s':>8} {'% roof':>7} "
        f"{'saved MB':>9} {'J':>8} {'tokens/J':>9}"
    ]
    for row in rows:
        head = f"{row['shape']:24} {row['dtype']:5} {row['impl']:17} {row['direction']:17}"
        if not row["correct"]:
            lines.append(f"{head} WRONG, not timed: {row['note']}")
            continue
        saved_mb = None if row["saved_bytes"] is None else row["saved_bytes"] / 1e6
        lines.append(
            f"{head} {row['ms']:10.3f} {row['tflops']:8.3f} {_cell(row['percent_of_roof'], 7, 1)} "
            f"{_cell(saved_mb, 9, 1)} {_cell(row['joules'], 8, 3)} {_cell(row['tokens_per_j'], 9, 0)}"
        )
    sources = sorted({row["roof_source"] for row in rows if row["roof_source"]})
    lines += [f"roof: products and bytes of each kernel at the peaks of the {source}" for source in sources]
    return "\n".join([*lines, "", *ratios(rows)])


def ratios(rows: Sequence[Row]) -> list[str]:
    """For each of our rows one line: its part of the products' speed, and how many times a rival's."""
    lines = []
    for ours in rows:
        if ours["impl"] != "moe" or not ours["correct"]:
            continue
        same = [
            row
            for row in rows
            if row["correct"] and all(row[key] == ours[key] for key in ("shape", "dtype", "direction"))
        ]
        rivals = {row["impl"]: row["ms"] / ours["ms"] for row in same if row["impl"] not in ("moe", ROOF)}
        case = f"{ours['shape']} {ours['dtype']} {ours['direction']}"
        parts = [f"{ratio:.2f}x {name}" for name, ratio in rivals.items()]
        lines.append(", ".join([f"{case}: ratio_to_matmul {ours['ratio_to_matmul']:.3f}", *parts]))
    return lines


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"
