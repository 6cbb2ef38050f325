"""Signals and lost ranks on real jobs: a checkpoint, the right exit code, and not one bit of difference."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from checkpoint_tensors import assert_bit_equal
from launches import OVERRIDES, RECIPE, STEPS, Start, end, last, only_rank
from train_runs import TINY, command, losses, train_command
from train_runs import wait_for_step as wait

from moe.launch.local import newest_step

FAKE_SLURM = {
    # Leaves out srun's own options and becomes the node, as srun hands signals on to it.
    "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n',
    "scontrol": '#!/bin/bash\n[[ $1 == requeue ]] && echo "$@" >> "$SCONTROL_LOG" || echo localhost\n',
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_sbatch_script_saves_at_the_time_limit_requeues_itself_and_goes_on_bit_equal(
    start: Start, clean_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "a run"
    job = ("--on", "slurm", "--gpus-per-node", "2", "--run-dir", str(run_dir), "--submit")
    settings = (f"launch.port={free_port()}", "launch.interface=lo", "launch.preflight=false")
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, text in {**FAKE_SLURM, "sbatch": "#!/bin/bash\necho 7\n"}.items():
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    slurm = {
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_ON_NODE": "2",
    }
    end(start(command("launch", str(RECIPE), *TINY, *OVERRIDES, *settings, *job), **slurm), expect=0)
    script = ["bash", str(run_dir / "launch" / "job.sbatch")]

    process = start(script, **slurm)
    wait(run_dir, 2, process)
    process.send_signal(signal.SIGUSR1)
    assert "stopped on request after step" in end(process, expect=5)
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    assert 2 <= newest_step(run_dir) < STEPS  # nothing but the signal saves before the end
    assert len(losses(run_dir)) == newest_step(run_dir)  # no step was lost
    assert not (run_dir / "report.json").exists()

    again = end(start(script, **slurm, SLURM_RESTART_COUNT="1"), expect=0)
    assert f"at step {newest_step(run_dir)}" not in again  # it has gone on since
    assert "resuming from" in again
    assert losses(run_dir) == losses(clean_run)
    assert_bit_equal(last(run_dir), last(clean_run))


@pytest.mark.slow  # half a minute; test_two_hosts.py loses ranks of two nodes, too
def test_two_nodes_stop_together_and_survive_a_killed_rank(
    start: Start, clean_run: Path, tmp_path: Path
) -> None:
    """Two nodes on one machine: a signal to one stops both, a rank lost on one is started again on both."""
    run_dir = tmp_path / "run"
    port = free_port()

    def node(job_id: str, address: str) -> subprocess.Popen[str]:
        options = {
            "--run-dir": run_dir,
            "--nodes": 2,
            "--gpus-per-node": 1,
            "--endpoint": f"127.0.0.1:{port}",
            "--address": address,
            "--job-id": job_id,
        }
        words = [f"{name}={value}" for name, value in options.items()]
        argv = command("node", str(RECIPE), *TINY, *OVERRIDES, "checkpoint.interval=4", *words)
        return start(argv, GLOO_SOCKET_IFNAME="lo")

    one, two = (node("first", address) for address in ("127.0.0.1", "127.0.0.2"))
    wait(run_dir, 1, one)
    assert not {signal.SIGTERM, signal.SIGUSR1} & blocked_signals(only_rank(one).pid)
    two.terminate()
    end(one, expect=5)
    end(two, expect=5)
    assert 1 <= newest_step(run_dir) < STEPS

    one, two = (node("second", address) for address in ("127.0.0.1", "127.0.0.2"))
    wait(run_dir, newest_step(run_dir) + 2, one)
    only_rank(two).kill()
    output = end(one, expect=0) + end(two, expect=0)
    assert "was killed by SIGKILL" in output
    assert "starting all ranks again, restart 1 of 3" in output
    assert losses(run_dir) == losses(clean_run)
    assert_bit_equal(last(run_dir), last(clean_run))


def blocked_signals(pid: int) -> set[int]:
    """Signals that a process does not take now."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigBlk:"))
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_job_of_one_process_stops_as_well(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(train_command(run_dir, f"train.steps={STEPS}", "checkpoint.interval=0"))
    wait(run_dir, 1, process)
    process.terminate()
    end(process, expect=5)
    assert 1 <= newest_step(run_dir) < STEPS


def test_failure_that_would_repeat_is_not_started_again(start: Start, tmp_path: Path) -> None:
    """Bad input found by a rank: one start, its exit code, no restart."""
    run_dir = tmp_path / "run"
    launch = command("launch", str(RECIPE), *TINY, "energy.meter=nvml", "--gpus-per-node", "2", "--submit")
    output = end(start([*launch, "--run-dir", str(run_dir)]), expect=2)
    assert "starting all ranks again" not in output
