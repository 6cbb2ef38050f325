"""Calls a function over and over from a side thread, and gives its first failure to whoever asks."""

from __future__ import annotations

import threading
from collections.abc import Callable


class BackgroundSampler:
    """Calls `sample` every `period_s` seconds in a daemon thread until closed.

    `sample` runs under one lock, also when `sample_now` calls it, so it needs none of its own. The first
    exception ends the thread and is raised again by every later `sample_now`.
    """

    def __init__(self, sample: Callable[[], None], *, period_s: float) -> None:
        self._sample = sample
        self._period_s = period_s
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="energy-sampler", daemon=True)
        self._thread.start()

    def sample_now(self) -> None:
        """Take one sample in the caller's thread. Raises what `sample` raised, now or earlier."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._sample()

    def close(self) -> None:
        """Stop the thread and wait for a sample under way."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._period_s):
            with self._lock:
                try:
                    self._sample()
                # Any failure belongs to the reader's thread, where it can be handled.
                except Exception as error:
                    self._failure = error
                    return
