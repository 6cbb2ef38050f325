"""The README's tables: every number of the result files, what failed, and where no GPU has been seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import readme_table
from benchmarks.layer_rows import UNMEASURED

CPU = {"device": "AMD EPYC", "threads": 2, "torch": "2.13", "triton": "3.7", "commit": "abc1234"}
CPU |= {"freed_memory": "kept"}
GPU = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11", "triton": "3.6", "commit": "def5678"}


def row(impl: str, direction: str = "forward+backward", **values) -> dict:
    measured = {"ms": 412.34, "tflops": 0.0937, "ratio_to_matmul": 0.816, "saved_bytes": 21_300_000}
    names = {"impl": impl, "shape": "4096,512,256,64,4", "dtype": "fp32", "direction": direction}
    return names | UNMEASURED | measured | {"correct": True, "stamp": CPU} | values


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def test_a_cpu_file_becomes_a_table(tmp_path: Path):
    rows = [row("matmul", saved_bytes=None), row("moe", "forward", ms=1.0), row("moe")]
    rows.append(row("hf_eager", **UNMEASURED))
    write(tmp_path / "2026-01-31-cpu-moe-layer-fp32.json", rows)
    text = readme_table.speed(tmp_path)
    assert "on AMD EPYC (CPU, 2 threads, freed memory kept; torch 2.13, triton 3.7, commit abc1234)" in text
    assert "](benchmarks/results/2026-01-31-cpu-moe-layer-fp32.json):" in text
    assert "| 4096,512,256,64,4 | fp32 | moe | 412.3 | 94 | 82 % | 21.3 |" in text
    assert "| 4096,512,256,64,4 | fp32 | matmul | 412.3 | 94 | 82 % |  |" in text
    assert "| 4096,512,256,64,4 | fp32 | hf_eager | wrong, not timed |  |  |  |" in text
    assert "| 1.0 |" not in text  # forward alone
    assert text.endswith(readme_table.NO_GPU)


def test_the_newest_suite_of_each_gpu_is_shown_with_what_failed(tmp_path: Path):
    parts = [
        {"name": "tests", "status": "failed", "result": None},
        {
            "name": "moe_layer",
            "status": "passed",
            "result": [row("moe", ms=12.0, tflops=413.0, percent_of_roof=47.0)],
        },
        {"name": "moe_layer_more", "status": "stopped", "result": None},
    ]
    suite = {"benchmark": "GPU suite", "stamp": GPU, "parts": parts}
    write(tmp_path / "2026-02-01-h100.json", suite)
    write(tmp_path / "2026-01-31-h100.json", suite | {"parts": []})
    write(tmp_path / "2026-01-31-cpu-quickstart.json", {"benchmark": "training run"})
    text = readme_table.speed(tmp_path)
    assert "on NVIDIA H100 80GB HBM3 (GPU; torch 2.11, triton 3.6, commit def5678)" in text
    assert "| moe | 12.00 | 413 | 82 % | 47 % | 21 |  |" in text
    assert "2026-01-31-h100" not in text
    assert text.endswith("Parts of the suite that did not pass: tests (failed).")
    assert readme_table.NO_GPU not in text


FIRST, LAST = readme_table.marks("speed")


def test_only_what_is_between_the_marks_changes():
    readme = f"before\n\n{FIRST}\nold\n{LAST}\n\nafter\n"
    new = readme_table.replaced(readme, "speed", "new")
    assert new == readme.replace("old", "new")
    assert readme_table.replaced(new, "speed", "new") == new


@pytest.mark.parametrize("readme", ["", FIRST, f"{LAST}\n{FIRST}"])
def test_a_readme_without_the_marks_is_refused(readme):
    with pytest.raises(ValueError, match="needs the lines"):
        readme_table.replaced(readme, "speed", "new")


def test_layouts_are_listed_with_their_differences_and_tolerances(tmp_path: Path):
    layout = {
        "model": "gqa",
        "ranks": 2,
        "layout": "tp=2",
        "steps": 3,
        "differences": {"losses": 7e-8, "grad_norm": 2e-7, "weights": 3e-6},
        "tolerances": {"losses": 1e-6, "grad_norm": 1e-5, "weights": 2e-4},
    }
    pair = {"model": "gqa", "from": "1", "to": "2 tp=2", "tensors": 9, "differing": 1}
    stamp = {"commit": "abc", "machine": "x86_64", "versions": {"torch": "2.13"}}
    write(tmp_path / "layout-matrix.json", stamp | {"layouts": [layout], "pairs": [pair, pair]})
    text = readme_table.layouts(tmp_path)
    assert "1 layouts against one rank over 3 steps, and 2 pairs" in text
    assert "with 2 differing tensors (x86_64, gloo; torch 2.13;" in text
    assert "losses 1e-06, grad_norm 1e-05, weights 2e-04" in text
    assert "| gqa | 2 | tp=2 | 7.0e-08 | 2.0e-07 | 3.0e-06 |" in text
