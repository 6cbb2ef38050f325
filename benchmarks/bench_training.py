"""Turns a finished run into a result file: its report, its config and the machine.

python -m benchmarks.bench_training runs/quickstart --json benchmarks/results/2026-01-31-cpu-quickstart.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

from benchmarks.harness import stamp, write_json
from moe.metering.report import read_report


def main() -> None:
    """Parse argv, print the result, write it if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="folder of a finished run")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    report = read_report(args.run_dir / "report.json")
    result = {
        "benchmark": "training run",
        "report": report.model_dump(mode="json"),
        "config": yaml.safe_load((args.run_dir / "config.yaml").read_text(encoding="utf-8")),
        "stamp": stamp("cpu" if report.device == "cpu" else "cuda"),
    }
    print(json.dumps(result, indent=1))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
