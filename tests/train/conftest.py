"""Runs that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_runs import OVERLAPPED, run, train_command


@pytest.fixture(scope="session")
def reference_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on one rank with checkpoints at 10 and 20; others are compared with it, none may change it."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run(train_command(run_dir, "train.steps=20", "checkpoint.interval=10"))
    return run_dir


@pytest.fixture(scope="session")
def overlapped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on two ranks with checkpoints at 5, 10, 15 and 20; none may change it."""
    run_dir = tmp_path_factory.mktemp("overlapped") / "run"
    run(train_command(run_dir, *OVERLAPPED, nproc=2))
    return run_dir
