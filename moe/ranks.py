"""What the ranks of a job tell each other outside the model: small objects, errors included.

An error on one rank must end all of them with the same message; a rank that raises alone leaves the others
waiting in a collective until its timeout.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from moe.errors import MoeError

T = TypeVar("T")


def local_rank() -> int:
    """This process's rank on its machine, as torchrun sets it; 0 in a job of one process."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_on_this_machine() -> int:
    """How many ranks the launcher started here, as torchrun says; 1 in a job of one process."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def on_rank0(function: Callable[[], T]) -> T:
    """Call the function on rank 0 and return its result on every rank; collective.

    Args:
        function: its result must be a plain picklable value.

    Raises:
        MoeError: that the function raised, on every rank.
    """
    box: list[tuple[T | None, MoeError | None] | None] = [None]
    if dist.get_rank() == 0:
        box[0] = _attempt(function)
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    result, error = box[0]
    if error is not None:
        error.on_all_ranks = True
        raise error
    return result  # type: ignore[return-value]


def on_every_rank(function: Callable[[], T]) -> list[T]:
    """Call the function on every rank and return all results in rank order; collective.

    Raises:
        MoeError: the first that any rank raised, on every rank, with the rank named.
    """
    outcomes: list[tuple[T | None, MoeError | None] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, _attempt(function))
    results: list[T] = []
    for rank, outcome in enumerate(outcomes):
        assert outcome is not None
        result, error = outcome
        if error is not None:
            shared = type(error)(f"rank {rank}: {error}")
            shared.on_all_ranks = True
            raise shared from error
        results.append(result)  # type: ignore[arg-type]
    return results


def _attempt(function: Callable[[], T]) -> tuple[T | None, MoeError | None]:
    """The result, or an error that a user can act on; any other error is a bug and ends this rank at once."""
    try:
        return function(), None
    except MoeError as error:
        return None, error


# What c10d backends say when the other end of a connection is gone or silent.
_LOST_WORDS = (
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "Timed out",
    "timed out",
    "Connection refused",
)


def explain_lost_rank(error: Exception) -> str | None:
    """If the error says that another rank is gone: which one, where that can be seen; else None.

    A collective reports a broken connection, not a rank. On this machine the missing process tells its rank.
    """
    is_distributed = isinstance(error, dist.DistError) or "gloo" in str(error)
    if not is_distributed or not any(word in str(error) for word in _LOST_WORDS):
        return None
    reason = str(error).strip().splitlines()[0].partition(" This is typically")[0].rstrip(".")
    return (
        f"rank {os.environ.get('RANK', '0')} lost contact with another rank{_missing_siblings()}: "
        f"{reason}. "
        "Continue from the newest checkpoint with `moe resume`"
    )


def _missing_siblings() -> str:
    """The ranks of this machine whose process has ended, in words; empty if none is seen to have."""
    import psutil

    alive = set()
    for process in psutil.Process(os.getppid()).children():
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.add(process.environ().get("LOCAL_RANK"))
        except psutil.Error:
            continue  # it ended while we looked
    local = {str(rank) for rank in range(ranks_on_this_machine())}
    offset = int(os.environ.get("RANK", "0")) - local_rank()
    missing = sorted(offset + int(rank) for rank in local - alive)
    return f" (rank {', '.join(map(str, missing))} of this machine has ended)" if missing else ""
