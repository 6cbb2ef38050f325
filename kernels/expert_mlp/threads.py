"""Experts, and rows, shared between threads of the CPU: each computes its own, alone.

Threads that share one small product wait for each other at every step: slow, and very slow on a busy machine.
Other work on many rows is shared out alike, for OpenMP's threads wait actively on the cores that ours need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

Expert = tuple[int, slice]  # its number and its rows
CHUNK_ROWS = 256


def share_experts(work: Callable[[int, slice], None], experts: Iterable[Expert]) -> None:
    """Call work(expert, rows) for each, in as many threads as torch may use.

    Args:
        work: must write memory that no other expert's call touches, or take turns.
        experts: with their rows in expert order; those without rows left out.
    """
    queue = largest_first(experts)
    num_threads, num_rows = torch.get_num_threads(), sum(rows.stop - rows.start for _, rows in queue)
    largest = queue[0][1].stop - queue[0][1].start if queue else 0
    # With a larger one, a thread would be left alone with it.
    if not queue or num_threads == 1 or largest * num_threads > num_rows:
        for expert, rows in queue:
            work(expert, rows)
        return
    _in_threads(work, queue, num_threads)


def largest_first(experts: Iterable[Expert]) -> list[Expert]:
    """The order in which `share_experts` hands experts out, so that threads end together."""
    return sorted(experts, key=lambda expert: expert[1].start - expert[1].stop)


def share_rows(work: Callable[[slice], None], num_rows: int) -> None:
    """Call work(rows) for chunks of rows that together are all; like `share_experts`."""
    chunks = [(0, slice(start, start + CHUNK_ROWS)) for start in range(0, num_rows, CHUNK_ROWS)]
    share_experts(lambda _, rows: work(rows), chunks)


def _in_threads(work: Callable[[int, slice], None], queue: list[Expert], num_threads: int) -> None:
    remaining = iter(queue)

    def alone() -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():  # whether gradients are recorded is each thread's own setting
            for expert, rows in remaining:
                work(expert, rows)

    try:
        with ThreadPoolExecutor(num_threads) as pool:
            calls = [pool.submit(alone) for _ in range(num_threads)]
        for call in calls:
            call.result()
    finally:
        torch.set_num_threads(num_threads)  # the pool's setting is the default of threads to come
