"""Small real runs through the command, as a user starts them; imported by tests as train_runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

REPOSITORY = Path(__file__).parents[1]

# The quick start's model, smaller: every kind of layer, more experts than ranks.
TINY = (
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_experts=8",
    "model.expert_hidden_size=32",
    "model.shared_expert_hidden_size=32",
    "model.attention.num_heads=4",
    "model.attention.head_dim=16",
    "data.seq_length=64",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.eval_sequences=16",
    "train.eval_interval=0",
    "train.log_interval=1",
    "optim.lr=1e-3",
    "optim.warmup_steps=4",
    "optim.decay_steps=40",
    "tracking.wandb=disabled",
)

# Two ranks, in step for every piece of a sequence and for every expert's rows.
OVERLAPPED = (
    "train.steps=20",
    "checkpoint.interval=5",
    "parallel.cp=2",
    "parallel.ep=2",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
)


def environment() -> dict[str, str]:
    """What a shell has, less what an outer job or pytest added; one thread a rank on two shared cores."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "TRITON_INTERPRET"))
    }
    # On a machine with GPUs too: these tests are about several ranks on one machine.
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(*arguments: str) -> list[str]:
    """Argv of the command `moe`."""
    return [sys.executable, "-m", "moe", *arguments]


def train_command(run_dir: Path, *overrides: str, nproc: int = 1) -> list[str]:
    """Argv of a tiny run into run_dir."""
    config = str(REPOSITORY / "configs" / "quickstart.yaml")
    return command("train", config, *TINY, *overrides, "--nproc", str(nproc), "--run-dir", str(run_dir))


def run(argv: list[str], *, expect: int = 0) -> str:
    """Run to the end; stdout and stderr together. Fails with that output on another exit code."""
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == expect, f"{argv} ended with {done.returncode}:\n{output[-4000:]}"
    return output


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    """Training loss of every step."""
    return [record["loss"] for record in metrics(run_dir)]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Return when the run has logged `step`; fail if it ends before."""
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s and process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir)) >= step:
            return
        time.sleep(0.05)
    pytest.fail(f"the run did not reach step {step}: {process.communicate()}")


def rank_process(launcher: int, rank: int) -> psutil.Process:
    """The process of a rank below its launcher."""
    for child in psutil.Process(launcher).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child
    pytest.fail(f"no process of rank {rank}")
