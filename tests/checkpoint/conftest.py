"""Checkpoints of random bytes in the shape that Megatron writes: shards, `.metadata`, a sub-folder."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from moe.checkpoint.manifest import commit_manifest, hash_files
from moe.checkpoint.store import begin, finish

SIZES_BYTES = {
    ".metadata": 700,
    "common.pt": 1_900,
    "__0_0.distcp": 40_000,
    "__1_0.distcp": 40_000,
    "rng/0.bin": 2_500,
}
WriteCheckpoint = Callable[[Path, int], Path]
Fork = Callable[[Callable[[], None]], int]


def _write(root: Path, step: int) -> Path:
    partial = begin(root, step)
    content = random.Random(step)
    for name, size_bytes in SIZES_BYTES.items():
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(content.randbytes(size_bytes))
    # Two "ranks" hash what each wrote; the order of gathering must not matter.
    ranks = [hash_files(partial, names) for names in (list(SIZES_BYTES)[3:], list(SIZES_BYTES)[:3])]
    state = {"step": step, "text": "é日本", "lr": 1e-300, "layout": {"tp": 1, "ep": 2}, "seeds": [1, 2**70]}
    commit_manifest(partial, step=step, entries=[*ranks[0], *ranks[1]], state=state)
    return finish(partial)


@pytest.fixture
def write_checkpoint() -> WriteCheckpoint:
    """Write a checkpoint whose bytes depend on its step only."""
    return _write


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return _write(tmp_path, 10)


@pytest.fixture
def fork() -> Fork:
    """Run a function in a child process; it exits 0, or 1 after an exception. Returns the process id."""

    def start(run: Callable[[], None]) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            run()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    return start


@pytest.fixture
def wait() -> Callable[[int], int]:
    """Wait for a child; its exit code, or minus the signal that ended it."""
    return lambda child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
