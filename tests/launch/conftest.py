"""What the tests of real jobs share."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from launches import OVERRIDES, Start
from train_runs import environment, run, train_command


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes; what a failed test leaves of them is ended with it."""
    started: list[subprocess.Popen[str]] = []

    def begin(argv: list[str], **variables: str) -> subprocess.Popen[str]:
        environ = environment() | variables
        started.append(
            subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


@pytest.fixture(scope="session")
def clean_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a job that was stopped or lost a rank must equal to the last bit."""
    run_dir = tmp_path_factory.mktemp("clean") / "run"
    run(train_command(run_dir, *OVERRIDES, nproc=2))
    return run_dir
