"""A layer of routed experts, forward and backward, beside its rivals and the matrix products alone.

python -m benchmarks.bench_moe_layer --device cpu --dtype fp32 --shape 4096,512,256,64,4 --json out.json
python -m benchmarks.bench_moe_layer --device cuda --set qwen3-30b --set sonic12
python -m benchmarks.bench_moe_layer --impl hf_eager        (ours and the products always run)

All get the same expert ids and weights (bench_topk_route times their choice) and take turns. `matmul` is the
same six matrix products as one dense feed-forward. A result that is not right is reported, not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import (
    Step,
    device_name,
    progress,
    require_device,
    stamp,
    time_interleaved_ms,
    write_json,
)
from benchmarks.layer_rows import ROOF, UNMEASURED, Row, as_text, layer_joules, peak_on, rates
from benchmarks.problem import Problem, make_problem
from benchmarks.rivals import RIVALS
from benchmarks.shapes import DIRECTIONS, SETS, Shape, parse_shape, shapes_of
from benchmarks.variants import (
    NotHereError,
    Runner,
    Variant,
    dense_products,
    ours,
    ours_fp8,
    torch_grouped_mm,
)
from benchmarks.verdict import complaints, judge

OURS = "moe"
IMPLEMENTATIONS: dict[str, Callable[[Problem], Variant]] = {
    OURS: ours,
    "moe_fp8": ours_fp8,
    "moe_fp8_wide_into_activation": partial(ours_fp8, wide_into_activation=True),
    "torch_grouped_mm": torch_grouped_mm,
    **RIVALS,
}
OTHERS = [name for name in IMPLEMENTATIONS if name != OURS]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> int:
    """Parse argv, measure shape after shape, print; 1 if our own result is wrong."""
    args = _parser().parse_args()
    require_device(args.device)
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    names = [OURS, *(args.impl or OTHERS)]
    rows: list[Row] = []
    for shape in shapes_of(args.device, args.shape, args.set):
        progress(f"{shape} {dtype} on {device_name(args.device)}")
        try:
            rows += bench(shape, dtype, args, names=names)
        except torch.cuda.OutOfMemoryError as error:
            progress(f"{shape} does not fit: {str(error).splitlines()[0]}")
        if args.json:  # after every shape: who is stopped early keeps what was measured
            write_json(args.json, rows)
    print(as_text(rows))
    return int(any(row["impl"] == OURS and not row["correct"] for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument(
        "--shape", type=parse_shape, action="append", metavar="T,H,I,E,K", help="may be repeated"
    )
    parser.add_argument("--set", choices=SETS, action="append", help="named shapes; may be repeated")
    parser.add_argument(
        "--impl",
        choices=OTHERS,
        action="append",
        help="rival; default: every one that is installed",
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="to time one shape, all implementations together"
    )
    parser.add_argument(
        "--joules-seconds", type=float, default=2.0, help="of running, for each number of joules; 0: none"
    )
    parser.add_argument(
        "--freed-memory",
        choices=("kept", "glibc"),
        default="kept",
        help="on a CPU: reused, for all alike, or left to the allocator, whose luck is then timed, too",
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser


def bench(shape: Shape, dtype: str, args: argparse.Namespace, *, names: list[str]) -> list[Row]:
    """Rows of one shape, three an implementation; rivals that are not here have none."""
    device, keep_freed = args.device, args.freed_memory == "kept"
    problem = make_problem(shape, DTYPES[dtype], device)
    runners, wrong = gate(problem, names)
    steps: dict[str, Step] = {ROOF: dense_products(problem)} | {
        name: runner.step for name, runner in runners.items()
    }
    progress(f"  timing {', '.join(steps)}")
    samples = time_interleaved_ms(steps, budget_s=args.seconds, device=device, keep_freed=keep_freed)
    peak = peak_on(device, dtype)
    joules = layer_joules(steps, runners, seconds=args.joules_seconds, device=device)
    rows = [
        {
            "impl": name,
            "shape": str(shape),
            "dtype": dtype,
            "direction": direction,
            **rates(shape, direction, samples[name], products=samples[ROOF], peak=peak),
            "saved_bytes": runners[name].saved_bytes() if name in runners else None,
            "correct": True,
            **joules[name, direction],
            "note": None,
        }
        for name in steps
        for direction in DIRECTIONS
    ]
    rows += [
        {"impl": name, "shape": str(shape), "dtype": dtype, "direction": direction, **UNMEASURED, "note": why}
        for name, why in wrong.items()
        for direction in DIRECTIONS
    ]
    where = stamp(device) | ({"freed_memory": args.freed_memory} if device == "cpu" else {})
    return [row | {"stamp": where} for row in rows]


def gate(problem: Problem, names: Sequence[str]) -> tuple[dict[str, Runner], dict[str, str]]:
    """Implementations whose output and every gradient are right, and what is wrong with others."""
    runners: dict[str, Runner] = {}
    wrong: dict[str, str] = {}
    for name in names:
        try:
            runner = Runner(problem, IMPLEMENTATIONS[name](problem))
            verdicts = judge(problem, runner.results())
            complaint = complaints(verdicts, problem.x_TD.dtype, runner.variant.fp8_products)
        except (NotHereError, torch.cuda.OutOfMemoryError) as error:
            progress(f"  {name}: left out: {_first_line(error)}")
            continue
        except Exception as error:  # what a stranger's code raises is its row's note
            complaint = f"{type(error).__name__}: {_first_line(error)}"
        if complaint:
            progress(f"  {name}: WRONG: {complaint}")
            wrong[name] = complaint
        else:
            runners[name] = runner
    return runners, wrong


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
