"""Kills a process that saves, at random instants and before every change of the file system."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from moe.checkpoint.manifest import verify
from moe.checkpoint.store import apply_retention, list_complete, newest_valid

KILLS = 15
CHANGES = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"})


def newest_step(root: Path) -> int:
    """The step that a resume would take; any complete but damaged checkpoint fails the test."""
    if not list_complete(root):
        return 0
    return verify(newest_valid(root, on_corrupt=lambda _, error: pytest.fail(f"torn: {error}"))).step


def every_complete_one_is_intact(root: Path) -> None:
    for checkpoint in list_complete(root):
        verify(checkpoint)


def test_kill_at_random_instants_never_leaves_a_torn_checkpoint(
    tmp_path: Path, write_checkpoint, fork, wait
) -> None:
    def save_for_ever() -> None:
        step = newest_step(tmp_path)
        while True:
            step += 1
            write_checkpoint(tmp_path, step)
            write_checkpoint(tmp_path, step)  # replacing is the more delicate path
            apply_retention(tmp_path, keep=2)

    instants, last, cut_short = random.Random(1), 0, 0
    for _ in range(KILLS):
        child = fork(save_for_ever)
        time.sleep(instants.uniform(0.02, 0.25))
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
        every_complete_one_is_intact(tmp_path)
        found = newest_step(tmp_path)
        assert found >= last
        last = found
        cut_short += any(path.suffix for path in tmp_path.iterdir())
    assert last > 0, "no save ever finished: the kills came too early to test anything"
    assert cut_short >= KILLS // 3, "the kills did not hit saves"
    assert len({path.name[:13] for path in list_complete(tmp_path)}) <= 3


def kill_before_change(number: int) -> None:
    """Arrange that this process is killed just before its `number`-th change of the file system."""
    seen = 0

    def count(event: str, _arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in CHANGES:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


@pytest.fixture
def without_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill keeps what was written unsynced, so here syncing would cost seconds and change nothing."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.mark.usefixtures("without_sync")
@pytest.mark.parametrize("step", [20, 10], ids=["new step", "same step again"])
def test_kill_before_every_change_leaves_the_old_or_the_new(
    tmp_path: Path, write_checkpoint, fork, wait, step: int
) -> None:
    kills = 0
    while True:
        root = tmp_path / str(kills)
        write_checkpoint(root, 10)

        def save(root: Path = root, number: int = kills + 1) -> None:
            kill_before_change(number)
            write_checkpoint(root, step)
            apply_retention(root, keep=1)

        code = wait(fork(save))
        every_complete_one_is_intact(root)
        assert newest_step(root) in (10, step)
        # The next run clears the remains and goes on.
        apply_retention(root, keep=1)
        assert [path.name[:5] for path in root.iterdir()] == ["step_"]
        write_checkpoint(root, 40)
        assert newest_step(root) == 40
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 25
