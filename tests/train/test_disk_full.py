"""A run whose disk fills while it saves: it stops with a reason, and what was complete stays."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

from train_runs import command, environment, run, train_command


def limit_file_size() -> None:
    """In the child: no file may grow beyond what logs and indices need, so a shard cannot be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))


def test_shard_that_cannot_be_written_ends_the_run_and_spares_the_checkpoint_before(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    run(train_command(run_dir, "train.steps=2", "train.eval_sequences=2"))
    done = subprocess.run(
        command("resume", str(run_dir), "train.steps=3"),
        env=environment(),
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "bytes are free" in done.stderr
    assert "step_00000003.partial" in done.stderr
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "step_00000002",
        "step_00000003.partial",
    ]
    run(command("verify", str(run_dir / "checkpoints" / "step_00000002")))
    run(command("resume", str(run_dir), "train.steps=3"))
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "step_00000002",
        "step_00000003",
    ]
