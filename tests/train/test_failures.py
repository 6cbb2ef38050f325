"""Runs that fail or are stopped: the right rank is blamed, the exit code is kept, nothing is left behind."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import psutil
from train_runs import environment, rank_process, run, train_command, wait_for_step


def start(argv: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_error_of_one_rank_keeps_its_exit_code_and_leaves_the_folder_usable(tmp_path: Path) -> None:
    # Only the first rank of a machine opens the meter, so only that rank can fail.
    output = run(train_command(tmp_path / "run", "energy.meter=nvml", "train.steps=1", nproc=2), expect=2)
    assert "nvml" in output.lower()
    assert "Traceback" not in output
    run(train_command(tmp_path / "run", "train.steps=1"))


def test_interrupt_ends_with_a_sentence(tmp_path: Path) -> None:
    process = start(train_command(tmp_path / "run", "train.steps=200"))
    wait_for_step(tmp_path / "run", 1, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "interrupted; continue from the newest checkpoint with `moe resume`" in output
    assert "Traceback" not in output


def test_ranks_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    process = start(train_command(tmp_path / "run", "train.steps=500", "parallel.ep=2", nproc=2))
    wait_for_step(tmp_path / "run", 1, process)
    ranks = [rank_process(process.pid, rank) for rank in (0, 1)]
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
