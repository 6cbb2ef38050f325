"""`moe train` and `moe resume` with engine.name=deepspeed, as a user starts them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoint_tensors import assert_bit_equal
from train_runs import command, losses, run, train_command

ZERO_3 = ("engine.name=deepspeed", "engine.zero_stage=3", "parallel.ep=2", "model.num_layers=2")


def test_train_and_resume(tmp_path: Path) -> None:
    straight, stopped, last = tmp_path / "straight", tmp_path / "stopped", "checkpoints/step_00000004"
    run(train_command(straight, *ZERO_3, "train.steps=4", "checkpoint.interval=2", nproc=2))
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / last)
    assert "at step 2" in run(command("resume", str(stopped), "--nproc", "2"))
    assert losses(stopped) == pytest.approx(losses(straight), rel=1e-6)
    assert_bit_equal(stopped / last, straight / last)
