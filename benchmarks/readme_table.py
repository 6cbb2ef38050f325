"""The README's parts about speed and layouts, made from the result files: nothing in them is typed by hand.

python -m benchmarks.readme_table            prints them
python -m benchmarks.readme_table --write    replaces them in README.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import BAD_INPUT, progress
from benchmarks.layout_table import layouts
from moe.durable import write_atomically

ROOT = Path(__file__).parents[1]
COMPILED = "compiled-kernels.json"
# FP8 is for the tensor cores of Hopper, MXFP8 for those that apply its scales.
COMPILED_SHOWN = (("bf16", 90), ("bf16", 100), ("fp8", 90), ("mxfp8", 100))
NO_GPU = (
    "No GPU has run this yet, so there is no figure for one; `scripts/gpu_suite.sh` makes the file that "
    "fills this place."
)
# Title of a column, its key, what the number is multiplied by, and how it is written.
CPU_COLUMNS = (
    ("ms", "ms", 1, "{:.1f}"),
    ("GFLOP/s", "tflops", 1e3, "{:.0f}"),
    ("of the products", "ratio_to_matmul", 100, "{:.0f} %"),
    ("saved MB", "saved_bytes", 1e-6, "{:.1f}"),
)
GPU_COLUMNS = (
    ("ms", "ms", 1, "{:.2f}"),
    ("TFLOP/s", "tflops", 1, "{:.0f}"),
    ("of the products", "ratio_to_matmul", 100, "{:.0f} %"),
    ("of the roof", "percent_of_roof", 1, "{:.0f} %"),
    ("saved MB", "saved_bytes", 1e-6, "{:.0f}"),
    ("tokens/J", "tokens_per_j", 1, "{:.0f}"),
)

Row = Mapping[str, Any]


def main() -> int:
    """Parse argv, print or write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="replace them in README.md")
    args = parser.parse_args()
    readme, results = ROOT / "README.md", ROOT / "benchmarks" / "results"
    if not args.write:
        print("\n\n".join(make(results) for make in SECTIONS.values()))
        return 0
    try:
        write_atomically(readme, rewritten(readme.read_text(encoding="utf-8"), results))
    except ValueError as error:
        progress(str(error))
        return BAD_INPUT
    return 0


def rewritten(readme: str, results: Path) -> str:
    """The README with every generated part made anew.

    Raises:
        ValueError: as `replaced`.
    """
    for name, make in SECTIONS.items():
        readme = replaced(readme, name, make(results))
    return readme


def replaced(readme: str, name: str, text: str) -> str:
    """The README with the text between the two marks of a part.

    Raises:
        ValueError: it does not have each mark once, in order.
    """
    first, last = marks(name)
    before, begin, rest = readme.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"README.md needs the lines {first!r} and {last!r} around the generated part")
    return f"{before}{first}\n{text}\n{last}{after}"


def marks(name: str) -> tuple[str, str]:
    """Lines of the README before and after a generated part."""
    return f"<!-- {name}: python -m benchmarks.readme_table --write -->", f"<!-- end of {name} -->"


def speed(results: Path) -> str:
    """What the result files say: how kernels compile, the layer's speed on CPUs, then on each GPU."""
    blocks = [compiled_block(path) for path in results.glob(COMPILED)]
    blocks += [cpu_block(path) for path in sorted(results.glob("*-cpu-moe-layer*.json"))]
    gpu_blocks = [gpu_block(path) for path in newest_suites(results)]
    return "\n\n".join([*blocks, *(gpu_blocks or [NO_GPU])])


def compiled_block(path: Path) -> str:
    """A table of the file of tests/shipped_kernels.py: products of its first shape, FP8 where each is for."""
    result = json.loads(path.read_text(encoding="utf-8"))
    rows, shape = result["rows"], result["rows"][0]["shape"]
    kernels, spilling = {row["kernel"] for row in rows}, sum(row["spill_bytes"] > 0 for row in rows)
    titles = ("product", "kernel", "operands", "tile M, N, K", "GPU")
    titles += ("registers", "spilled bytes", "shared KiB", "tensor-core instructions")
    lines = [
        f"Compiled by triton {result['triton']} for H100 (sm_90) and B200 (sm_100): {len(kernels)} kernels "
        f"in {len(rows)} configurations, {spilling or 'none'} of which spill. The products at the sizes of "
        f"{shape}, from [`{path.name}`](benchmarks/results/{path.name}):",
        "",
        _line(titles),
        "|" + "---|" * len(titles),
    ]
    for row in rows:
        if row["shape"] == shape and row["tile"] and (row["dtype"], row["capability"]) in COMPILED_SHOWN:
            tile = ", ".join(map(str, row["tile"]))
            kernel = row["kernel"].removesuffix("_kernel")
            shared = f"{row['shared_bytes'] / 1024:.0f}"
            counts = [row["registers"], row["spill_bytes"], shared, row["tensor_core_instructions"]]
            names = [row["product"], f"`{kernel}`", row["dtype"], tile, f"sm_{row['capability']}"]
            lines.append(_line([*names, *map(str, counts)]))
    return "\n".join(lines)


def newest_suites(results: Path) -> list[Path]:
    """The last file of scripts/gpu_suite.sh for each GPU."""
    newest: dict[str, Path] = {}
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("benchmark") == "GPU suite":
            newest[content["stamp"]["device"]] = path
    return list(newest.values())


def cpu_block(path: Path) -> str:
    """A table of one file of bench_moe_layer."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    where = rows[0]["stamp"]
    threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    memory = (
        "freed memory kept" if where["freed_memory"] == "kept" else f"memory as {where['freed_memory']} does"
    )
    return f"{caption(where, path.name, f'CPU, {threads}, {memory}')}\n\n{table(rows, CPU_COLUMNS)}"


def gpu_block(path: Path) -> str:
    """Tables of one file of the GPU suite; what failed is said."""
    suite = json.loads(path.read_text(encoding="utf-8"))
    layers = [part for part in suite["parts"] if part["name"].startswith("moe_layer") and part["result"]]
    bad = [
        f"{part['name']} ({part['status']})"
        for part in suite["parts"]
        if part["status"] not in ("passed", "stopped")
    ]
    blocks = [
        caption(suite["stamp"], path.name, "GPU"),
        *(table(part["result"], GPU_COLUMNS) for part in layers),
    ]
    if bad:
        blocks.append(f"Parts of the suite that did not pass: {', '.join(bad)}.")
    return "\n\n".join(blocks)


def caption(where: Row, file: str, kind: str) -> str:
    """What was measured, where, and with which versions."""
    versions = f"torch {where['torch']}, triton {where['triton']}, commit {where['commit']}"
    return (
        f"Experts forward+backward on {where['device']} ({kind}; {versions}), "
        f"from [`{file}`](benchmarks/results/{file}):"
    )


def table(rows: Sequence[Row], columns: Sequence[tuple[str, str, float, str]]) -> str:
    """Forward+backward of every implementation; what was wrong has no numbers."""
    titles = ["T,H,I,E,K", "dtype", "implementation", *(title for title, *_ in columns)]
    lines = [_line(titles), "|" + "---|" * len(titles)]
    for row in rows:
        if row["direction"] == "forward+backward":
            cells = [_cell(row[key], scale, form) for _, key, scale, form in columns]
            if not row["correct"]:
                cells = ["wrong, not timed", *[""] * (len(columns) - 1)]
            lines.append(_line([row["shape"], row["dtype"], row["impl"], *cells]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: float | None, scale: float, form: str) -> str:
    return "" if value is None else form.format(value * scale)


SECTIONS: dict[str, Callable[[Path], str]] = {"layouts": layouts, "speed": speed}


if __name__ == "__main__":
    sys.exit(main())
