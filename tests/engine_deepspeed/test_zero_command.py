"""`moe train` and `moe resume` with engine.name=deepspeed, as a user starts them."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_tensors import assert_bit_equal
from train_runs import command, losses, run, train_command

ZERO_3 = ("engine.name=deepspeed", "engine.zero_stage=3", "parallel.ep=2", "model.num_layers=2")


def test_train_and_resume(tmp_path: Path) -> None:
    run(train_command(tmp_path / "straight", *ZERO_3, "train.steps=4", "checkpoint.interval=2", nproc=2))
    run(train_command(tmp_path / "stopped", *ZERO_3, "train.steps=2", "checkpoint.interval=2", nproc=2))
    resumed = run(command("resume", str(tmp_path / "stopped"), "train.steps=4", "--nproc", "2"))
    assert "at step 2" in resumed
    assert losses(tmp_path / "stopped")[2:] == pytest.approx(losses(tmp_path / "straight")[2:], rel=1e-6)
    last = Path("checkpoints") / "step_00000004"
    assert_bit_equal(tmp_path / "stopped" / last, tmp_path / "straight" / last)
