"""A run whose disk fills while it saves: it stops with a reason, and what was complete stays."""

from __future__ import annotations

import resource
import shutil
import subprocess
from pathlib import Path

from train_runs import command, environment, run


def limit_file_size() -> None:
    """In the child: no file may grow beyond what logs and indices need, so a shard cannot be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))


def test_shard_that_cannot_be_written_ends_the_run_and_spares_the_checkpoint_before(
    reference_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(reference_run, run_dir)
    done = subprocess.run(
        command("resume", str(run_dir), "train.steps=21"),
        env=environment(),
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "bytes are free" in done.stderr
    assert "step_00000021.partial" in done.stderr
    assert checkpoints(run_dir) == ["step_00000010", "step_00000020", "step_00000021.partial"]
    run(command("verify", str(run_dir / "checkpoints" / "step_00000020")))
    run(command("resume", str(run_dir), "train.steps=21"))
    assert checkpoints(run_dir) == ["step_00000020", "step_00000021"]  # two are kept


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())
