"""The README's table of layouts: each one's distance from the run on one rank, from the file of the test run.

pytest tests/engine -m "slow or not slow" --layout-json benchmarks/results/layout-matrix.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "layout-matrix.json"
COMPARED = ("losses", "grad_norm", "weights")


def layouts(results: Path) -> str:
    """What layout-matrix.json says."""
    matrix = json.loads((results / FILE).read_text(encoding="utf-8"))
    tolerances = matrix["layouts"][0]["tolerances"]
    differing = sum(pair["differing"] for pair in matrix["pairs"])
    versions = ", ".join(f"{name} {version}" for name, version in matrix["versions"].items())
    lines = [
        f"{len(matrix['layouts'])} layouts against one rank over {matrix['layouts'][0]['steps']} steps, and "
        f"{len(matrix['pairs'])} pairs saved in one and read in another with {differing} differing tensors "
        f"({matrix['machine']}, gloo; {versions}; from [`{FILE}`](benchmarks/results/{FILE})). Tolerances: "
        + ", ".join(f"{name} {tolerances[name]:.0e}" for name in COMPARED)
        + ".",
        "",
        "<details><summary>Every layout</summary>",
        "",
        "| model | ranks | layout | losses | gradient norm | weights |",
        "|" + "---|" * 6,
        *(_line(row) for row in matrix["layouts"]),
        "",
        "</details>",
    ]
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    differences = (f"{row['differences'][name]:.1e}" for name in COMPARED)
    return f"| {' | '.join([row['model'], str(row['ranks']), row['layout'], *differences])} |"
