"""A rank killed in any phase of a step: the job starts again by itself and ends bit-equal to a clean run.

The fast case has two ranks. The slow ones are the whole matrix, 4 ranks x 7 phases; with KILL_MATRIX_JSON
set they write what happened to that file (benchmarks/results/kill-matrix.json is one).
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_tensors import assert_bit_equal
from launches import RECIPE, STEPS, Start, last
from train_runs import REPOSITORY, TINY, command, losses, run

# What a rank enters in each phase; `step` is the optimizer step in which it is killed there.
PHASES = {
    "data": ("moe.data.dataset", "batch_for"),
    "forward": ("moe.layer.experts", "GroupedExperts.forward"),
    "all-to-all": ("moe.layer.all_to_all", "RowsInFlight.leave"),
    "backward": ("moe.kernels.expert_mlp.torch_backend", "expert_mlp_bwd"),
    "reduce": ("megatron.core.distributed.param_and_grad_buffer", "_ParamAndGradBucketGroup.start_grad_sync"),
    "optimizer": ("torch.optim.adam", "Adam.step"),
    "save": ("moe.checkpoint.save", "hash_files"),
}
INTERVAL = 4  # of checkpoints: a run that is killed at step 7 has one to go on from
HOOK = Path(__file__).parent / "kill_hook"
# Each dimension that a phase communicates over: tensor, expert, data and expert-data parallelism of two.
LAYOUT = ("parallel.tp=2", "parallel.ep=2")


def launch(run_dir: Path, ranks: int, *overrides: str) -> list[str]:
    fit = (f"train.steps={STEPS}", f"checkpoint.interval={INTERVAL}", *overrides)
    job = ("--on", "local", "--gpus-per-node", str(ranks), "--run-dir", str(run_dir), "--submit")
    return command("launch", str(RECIPE), *TINY, *fit, *job)


def kill_in(phase: str, rank: int, mark: Path) -> dict[str, str]:
    """The environment that makes a rank of a job end itself there, once."""
    step = 2 * INTERVAL if phase == "save" else 2 * INTERVAL - 1
    module, function = PHASES[phase]
    path = os.pathsep.join([str(HOOK), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"KILL_AT": f"{rank}:{step}:{module}:{function}", "KILL_MARK": str(mark), "PYTHONPATH": path}


def output_of(process: subprocess.Popen[str], timeout_s: float) -> str:
    """What a job says that ends well; one that hangs fails with what it said until then."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its ranks, which hold the pipe
        output = f"no end after {timeout_s:g} s:\n{process.communicate(timeout=60)[0]}"
    assert process.returncode == 0, output
    return output


def check_recovery(output: str, rank: int, run_dir: Path, clean: Path) -> None:
    assert re.search(rf"rank {rank} \(process \d+\) was killed by SIGKILL", output), output
    assert output.count("starting all ranks again, restart 1 of 3") == 1, output
    assert f"at step {INTERVAL}" in output, output
    assert losses(run_dir) == losses(clean)
    assert_bit_equal(last(run_dir), last(clean))


@pytest.mark.parametrize(
    ("phase", "rank"), [("all-to-all", 1), pytest.param("save", 0, marks=pytest.mark.slow)]
)
def test_killed_rank_is_started_again_and_the_end_is_bit_equal(
    phase: str, rank: int, start: Start, clean_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = launch(run_dir, 2, "parallel.ep=2")
    process = start(argv, **kill_in(phase, rank, tmp_path / "killed"))
    check_recovery(output_of(process, 250), rank, run_dir, clean_run)


# ---- the whole matrix -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean_run_of_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir: Path = tmp_path_factory.mktemp("clean of 4") / "run"
    run(launch(run_dir, 4, *LAYOUT))
    return run_dir


@pytest.fixture(scope="module")
def record() -> Iterator[dict[str, Any]]:
    """Cases by name, written at the end, beside those of an earlier part of the matrix at the same commit."""
    cases: dict[str, Any] = {}
    yield cases
    if "KILL_MATRIX_JSON" not in os.environ:
        return
    path = Path(os.environ["KILL_MATRIX_JSON"])
    git = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    head = {
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} logical CPUs, gloo",
        "layout": "tp=2 ep=2 dp=2, 4 ranks",
        "recovered_s": "from the kill until the ranks have started again and loaded the newest checkpoint",
    }
    before = json.loads(path.read_text()) if path.exists() else {}
    earlier = before.get("cases", {}) if before.get("commit") == head["commit"] else {}
    path.write_text(json.dumps({**head, "cases": earlier | cases}, indent=2) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("phase", PHASES)
def test_any_rank_killed_in_any_phase(  # noqa: PLR0917 - pytest fills them by name
    phase: str, rank: int, start: Start, clean_run_of_4: Path, record: dict[str, Any], tmp_path: Path
) -> None:
    run_dir, mark = tmp_path / "run", tmp_path / "killed"
    result: dict[str, Any] = {"outcome": "failed", "recovered_s": None}
    record[f"{phase}, rank {rank}"] = result
    process = start(launch(run_dir, 4, *LAYOUT), **kill_in(phase, rank, mark))
    recovered_s = seconds_to_next_start(process, run_dir, mark)
    check_recovery(output_of(process, 600), rank, run_dir, clean_run_of_4)
    result |= {"outcome": "restarted once, bit-equal", "recovered_s": round(recovered_s, 1)}


def seconds_to_next_start(process: subprocess.Popen[str], run_dir: Path, mark: Path) -> float:
    """From the kill until the job has loaded its checkpoint and trains again."""
    starts = run_dir / "starts.jsonl"
    while process.poll() is None:
        if mark.exists() and starts.exists() and len(starts.read_text().splitlines()) == 2:
            return starts.stat().st_mtime - mark.stat().st_mtime
        time.sleep(0.2)
    return float("nan")
