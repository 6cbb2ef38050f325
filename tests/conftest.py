"""Fixtures of the whole suite. Modules beside this file are imported by name (pytest's `pythonpath`)."""

from __future__ import annotations

import os
import signal

# numpy computes the interpreter's blocks: one thread, set before numpy is imported, or a busy machine crawls.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

# Triton asks when it is imported, which happens in tests of kernels only.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from poison import poisoned_empty
from ranks_pool import RankPool


def pytest_addoption(parser: pytest.Parser) -> None:
    """--layout-json: see tests/engine/conftest.py."""
    parser.addoption("--layout-json", metavar="FILE", help="write the layouts that were compared")


def pytest_configure() -> None:
    """A shell's background job ignores SIGINT, and so would every program that a test interrupts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def start_ranks() -> Iterator[Callable[..., RankPool]]:
    """Makes RankPools (same arguments) that live as long as the test file."""
    pools: list[RankPool] = []

    def start(num_ranks: int, **options: Any) -> RankPool:
        # The first pool of a session decides what its server imports, so all ask for the slowest.
        options.setdefault("preload", ("torch.distributed", "moe.engine.megatron"))
        pools.append(RankPool(num_ranks, **options))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


@pytest.fixture
def poison_empty() -> Iterator[None]:
    """torch.empty holds NaN during the test."""
    with poisoned_empty():
        yield


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Where Triton's kernels run: the GPU, or the CPU through the interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    from triton_interpreter import install

    install()
    return "cpu"
