"""Calls a function over and over from a side thread, and gives its first failure to whoever asks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

from moe.metering.energy import Boundary, Source

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Sample:
    """What was read from every device of a meter at one moment.

    Attributes:
        time_s: Monotonic seconds.
        counter_j: Each device's counter since its driver was loaded; empty where there are none.
        power_w: Each device's power; None where it gave no reading.
    """

    time_s: float
    counter_j: tuple[float, ...]
    power_w: tuple[float | None, ...]


class Recorder(Protocol):
    """Keeps the samples of one meter."""

    def begin(self, *, devices: tuple[str, ...], source: Source, power_boundary: Boundary) -> None:
        """Note what the samples are of."""
        ...

    def take(self, sample: Sample) -> None:
        """Keep one; called from the sampling thread or a reader's, one at a time."""
        ...


class BackgroundSampler(Generic[T]):
    """Fetches a sample every `period_s` seconds in a daemon thread and has it taken, until closed.

    `fetch` may be slow: nobody waits for it. `take` and what `call` runs have their turns under one lock, so
    they need none of their own. The first exception, in any of them, ends the sampling and is raised again by
    every later `call`.
    """

    def __init__(self, fetch: Callable[[], T], take: Callable[[T], None], *, period_s: float) -> None:
        self._fetch = fetch
        self._take = take
        self._period_s = period_s
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="energy-sampler", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], R]) -> R:
        """Run a function between two samples, in the caller's thread. Raises what failed, now or earlier."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            try:
                return function()
            # Whatever it is, the readings after it would rest on a state that is half updated.
            except Exception as error:
                self._failure = error
                raise

    def close(self) -> None:
        """Stop the thread and wait for a sample under way."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._period_s):
            try:
                sample = self._fetch()
                self.call(partial(self._take, sample))
            # Any failure belongs to the reader's thread, where it can be handled.
            except Exception as error:
                with self._lock:
                    self._failure = self._failure or error
                return
