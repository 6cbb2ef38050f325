"""The GPU suite without a GPU: what it says, and what it records of parts that pass, fail or last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu_suite import Part

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_suite.sh"
# What the machine with the GPU may not have, for its image is not ours.
NOT_NEEDED = (
    *("pydantic", "safetensors", "typer", "rich", "yaml", "megatron", "deepspeed", "tokenizers", "xxhash"),
    *("psutil", "pynvml", "transformers", "matplotlib", "wandb"),
)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The test's python, whatever `python3` is.
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )


def test_dry_run_names_every_part_and_starts_none():
    done = run_script("--dry-run")
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names[:3] == ["ceilings", "tests", "topk_route"]
    assert {"moe_layer", "grouped_gemm", "tune_tiles", "moe_layer_tuned", "layer_joules"} < set(names)
    assert done.stdout.splitlines()[-1].startswith("at most 525 s")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the suite would run")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path):
    done = run_script("--out", str(tmp_path))
    assert done.returncode == 2
    assert "no GPU: torch" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_it_ends_within_nine_minutes(tmp_path: Path):
    suite = gpu_suite.parts(tmp_path)
    assert gpu_suite.BUDGET_S + gpu_suite.GRACE_S <= 540
    assert sum(part.budget_s for part in suite if part.budget_s < gpu_suite.BUDGET_S) <= gpu_suite.BUDGET_S
    assert len({part.name for part in suite}) == len(suite)


def python(code: str) -> tuple[str, ...]:
    return ("-c", code)


def test_every_part_is_recorded(tmp_path: Path, capsys):
    folder, path = tmp_path / "parts", tmp_path / "results" / "2026-01-31-h100.json"
    folder.mkdir()
    suite = [
        Part("good", python(f"open('{folder}/good.json', 'w').write('[1]'); print('fine')"), 60),
        Part("bad", python("raise SystemExit('it broke')"), 60),
        Part("slow", python(f"open('{folder}/slow.json', 'w').write('[2]'); import time; time.sleep(60)"), 1),
        Part("rest", python("import time; time.sleep(60)"), 1, takes_the_rest=True),
    ]
    assert gpu_suite.run_all(suite, folder, path, head={"benchmark": "GPU suite"}) == 1
    report = json.loads(path.read_text())
    assert report["benchmark"] == "GPU suite"
    statuses = {part["name"]: part["status"] for part in report["parts"]}
    assert statuses == {"good": "passed", "bad": "failed", "slow": "timed out", "rest": "stopped"}
    good, bad, slow, _ = report["parts"]
    assert (good["result"], good["tail"], good["exit_code"]) == ([1], "fine\n", 0)
    assert (bad["result"], bad["tail"], bad["exit_code"]) == (None, "it broke\n", 1)
    assert slow["result"] == [2]  # what it had measured
    assert 1 <= slow["seconds"] < 10
    assert capsys.readouterr().out.endswith("not passed: bad, slow\n")


def test_a_part_ends_with_its_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_suite, "GRACE_S", 0.5)
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(worker.pid, flush=True); time.sleep(60)"
    )
    found = gpu_suite.run_part(Part("stubborn", python(code), 2), tmp_path, seconds_left=60)
    assert found["status"] == "timed out"
    worker = Path("/proc", found["tail"].strip(), "stat")
    deadline_s = time.monotonic() + 5
    while worker.exists() and " Z " not in worker.read_text() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not worker.exists() or " Z " in worker.read_text()


def test_no_part_starts_when_the_time_is_over(tmp_path: Path):
    found = gpu_suite.run_part(Part("late", python("print(1)"), 60), tmp_path, seconds_left=5)
    assert (found["status"], found["tail"]) == ("skipped", "no time is left")


def test_counts_of_tests(tmp_path: Path):
    path = tmp_path / "tests.xml"
    assert gpu_suite.test_counts(path) is None
    path.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase classname="a" name="x"/><testcase classname="b" name="y"><failure/></testcase>'
        '<testcase classname="b" name="z"><skipped/>'
        "</testcase></testsuite></testsuites>"
    )
    counts = {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": ["b::y"]}
    assert gpu_suite.test_counts(path) == counts


def test_file_names_of_gpus():
    assert gpu_suite.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert gpu_suite.slug("NVIDIA H200") == "h200"


def test_benchmarks_and_the_layer_import_with_torch_triton_and_numpy_only():
    modules = ("bench_moe_layer", "bench_topk_route", "bench_grouped_gemm", "tune_tiles", "energy_trace")
    modules += ("bench_layer_joules",)
    code = "\n".join(
        [
            "import sys",
            "class Nothing:",
            "    def find_spec(self, name, path=None, target=None):",
            f"        if name.partition('.')[0] in {NOT_NEEDED!r}:",
            "            raise ModuleNotFoundError(f'{name} is not installed', name=name)",
            "sys.meta_path.insert(0, Nothing())",
            "import moe.layer",
            *(f"import benchmarks.{module}" for module in (*modules, "gpu_suite", "roofs")),
            "from benchmarks.rivals import RIVALS",
            "from benchmarks.problem import make_problem",
            "from benchmarks.shapes import Shape",
            "from benchmarks.bench_moe_layer import gate, IMPLEMENTATIONS",
            "import torch",
            "problem = make_problem(Shape(8, 16, 16, 4, 2), torch.float32, 'cpu')",
            "runners, wrong = gate(problem, list(IMPLEMENTATIONS))",
            "print(sorted(runners), wrong)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['moe', 'torch_grouped_mm'] {}\n"
    assert "hf_eager: left out: transformers with Qwen3MoeExperts is not installed" in done.stderr
