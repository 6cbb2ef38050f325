"""Runs everything that needs a GPU within nine minutes and writes one dated JSON: see scripts/gpu_suite.sh.

A part that fails or takes too long is recorded and the next one starts. The file is written after each part.
Exit codes: 0 all parts passed, 1 one did not, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import site
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import progress, require_device, stamp, write_json

ROOT = Path(__file__).parents[1]
BUDGET_S = 525.0
# For a part whose time is over to write what it has: pytest its report.
GRACE_S = 10.0
# A part that could not even import its kernels in this time is not started.
LEAST_S = 10.0
TAIL_CHARACTERS = 4000
# A loop over experts takes seconds with 512 of them.
QUICK = (
    "moe_fp8",
    "moe_fp8_wide_into_activation",
    "torch_grouped_mm",
    "hf_grouped_mm",
    "liger",
    "sonicmoe",
    "scattermoe",
    "megablocks",
)
TESTS = ("tests/kernels", "tests/layer/test_moe_layer.py", "tests/benchmarks/test_tune_tiles.py")


@dataclass(frozen=True)
class Part:
    """One command of the suite.

    Attributes:
        name: also of its result file, which the command writes.
        arguments: of python.
        budget_s: it is stopped after so long, or when the suite's time is over.
        takes_the_rest: being stopped is no failure; what it had measured counts.
    """

    name: str
    arguments: tuple[str, ...]
    budget_s: float
    takes_the_rest: bool = False


def parts(folder: Path) -> list[Part]:
    """What is run, in order: what matters most first."""

    def bench(module: str, name: str, budget_s: float, *options: str, rest: bool = False) -> Part:
        arguments = ("-m", f"benchmarks.{module}", *options, "--json", str(folder / f"{name}.json"))
        return Part(name, arguments, budget_s, takes_the_rest=rest)

    headline = ("--device", "cuda", "--set", "qwen3-30b")
    tuned = (*headline, "--seconds", "4", "--joules-seconds", "0", "--impl", "torch_grouped_mm")
    more = ("--device", "cuda", "--set", "olmoe", "--set", "qwen3-next", "--set", "sonic12")
    quick = (option for name in QUICK for option in ("--impl", name))
    tuning = ("-m", "benchmarks.tune_tiles", "--set", "qwen3-30b", "--seconds", "1")
    return [
        bench("roofs", "ceilings", 30),
        Part("tests", _test_arguments(folder), 170),
        bench("bench_topk_route", "topk_route", 45, "--device", "cuda", "--seconds", "0.5"),
        bench("bench_moe_layer", "moe_layer", 75, *headline, "--seconds", "8", "--joules-seconds", "1"),
        bench("bench_grouped_gemm", "grouped_gemm", 35, *headline),
        bench("bench_layer_joules", "layer_joules", 85),  # bf16 against FP8, counter against power trace
        Part("tune_tiles", tuning, 45, takes_the_rest=True),
        bench("bench_moe_layer", "moe_layer_tuned", 35, *tuned),
        bench(
            "bench_moe_layer",
            "moe_layer_more",
            BUDGET_S,
            *more,
            *("--seconds", "3", "--joules-seconds", "0"),
            *quick,
            rest=True,
        ),
    ]


def _test_arguments(folder: Path) -> tuple[str, ...]:
    # Compiling takes the time, and that is done on the CPU.
    workers = ("-n", str(min(12, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    report = f"--junitxml={folder / 'tests.xml'}"
    return ("-m", "pytest", *TESTS, "-q", "-p", "no:cacheprovider", *workers, report)


def main() -> int:
    """Parse argv, run the parts, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder")
    parser.add_argument("--commit", help="of these files, where they are not in a git repository")
    parser.add_argument("--dry-run", action="store_true", help="only print the parts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as folder:
        if args.dry_run:
            print("\n".join(describe(part) for part in parts(Path(folder))))
            print(f"at most {BUDGET_S:.0f} s in all; one file in {args.out}")
            return 0
        require_device("cuda")
        where = stamp("cuda")
        where["commit"] = args.commit or where["commit"]
        path = args.out / f"{where['date']}-{slug(where['device'])}.json"
        head = {"benchmark": "GPU suite", "stamp": where, "nvidia_smi": nvidia_smi()}
        return run_all(parts(Path(folder)), Path(folder), path, head=head)


def describe(part: Part) -> str:
    """One line for a person."""
    limit = "the rest" if part.budget_s >= BUDGET_S else f"{part.budget_s:.0f} s"
    return f"{part.name:16} {limit:>8}  python {' '.join(part.arguments)}"


def run_all(suite: Sequence[Part], folder: Path, path: Path, *, head: Mapping[str, Any]) -> int:
    """Run the parts, keep the file up to date; 0 if all of them passed."""
    found: list[dict[str, Any]] = []
    end_s = time.monotonic() + BUDGET_S
    for part in suite:
        progress(f"== {describe(part)}")
        found.append(run_part(part, folder, seconds_left=end_s - time.monotonic()))
        progress(f"   {found[-1]['status']} after {found[-1]['seconds']:.0f} s")
        write_json(path, {**head, "parts": found})
    failed = [each["name"] for each in found if each["status"] not in ("passed", "stopped")]
    print(f"{path}: {len(suite) - len(failed)} of {len(suite)} parts passed")
    if failed:
        print(f"not passed: {', '.join(failed)}")
    return int(bool(failed))


def run_part(part: Part, folder: Path, *, seconds_left: float) -> dict[str, Any]:
    """Status, seconds, what the command wrote, and the end of its output."""
    found: dict[str, Any] = {"name": part.name, "command": ["python", *part.arguments], "seconds": 0.0}
    if why_not := reason_to_skip(part, seconds_left):
        return found | {"status": "skipped", "result": None, "tail": why_not}
    log, start_s = folder / f"{part.name}.log", time.monotonic()
    with log.open("wb") as output:
        # In a session of its own, so that its workers end with it.
        process = subprocess.Popen(
            [sys.executable, *part.arguments],
            cwd=ROOT,
            env=environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=min(part.budget_s, seconds_left))
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code = stop(process)
            status = "stopped" if part.takes_the_rest else "timed out"
    return found | {
        "status": status,
        "exit_code": code,
        "seconds": time.monotonic() - start_s,
        "result": result_of(part, folder),
        "tail": log.read_text(encoding="utf-8", errors="replace")[-TAIL_CHARACTERS:],
    }


def stop(process: subprocess.Popen[bytes]) -> int:
    """Interrupt a process, then end it with its workers; its exit code."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        progress("   it does not end by itself")
    with suppress(ProcessLookupError):  # none of them is left
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def environment(folder: Path) -> dict[str, str]:
    """The suite's own, but tuned tiles and compiled kernels go to its folder, not to the user's home."""
    return os.environ | {"HOME": str(folder), "PYTHONUSERBASE": site.getuserbase()}


def reason_to_skip(part: Part, seconds_left: float) -> str | None:
    """Why a part is not started, if it is not."""
    if seconds_left < LEAST_S:
        return "no time is left"
    if part.name == "tests" and not importlib.util.find_spec("pytest"):
        return "pytest is not installed"
    return None


def result_of(part: Part, folder: Path) -> object:
    """What the part wrote: a benchmark's rows, the tuned tiles, the counts of pytest; None for nothing."""
    if part.name == "tests":
        return test_counts(folder / "tests.xml")
    path = folder / (".cache/joulemoe/tiles.json" if part.name == "tune_tiles" else f"{part.name}.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def test_counts(path: Path) -> dict[str, object] | None:
    """Numbers of tests, and the names of those that failed."""
    if not path.exists():
        return None
    suite = ET.parse(path).getroot().find("testsuite")  # noqa: S314 - pytest wrote it a moment ago
    if suite is None:
        return None
    failed = [case for case in suite.iter("testcase") if {"failure", "error"} & {child.tag for child in case}]
    return {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} | {
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    }


def nvidia_smi() -> str | None:
    """Driver, power limit, clocks and memory of the GPUs in one line each; None without the command."""
    fields = "name,driver_version,power.limit,clocks.max.sm,clocks.max.memory,memory.total"
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError) as error:
        progress(f"nvidia-smi does not answer: {error}")
        return None
    return found.stdout.strip()


def slug(gpu: str) -> str:
    """A GPU's name as part of a file name: h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")


if __name__ == "__main__":
    sys.exit(main())
