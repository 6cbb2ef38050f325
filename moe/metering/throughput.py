"""How fast a run goes: tokens per second and time left, over the last steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """The speed of the last steps.

    Attributes:
        step_s: Seconds of the last step.
        tokens_per_s: Tokens a second over the window.
        eta_s: Seconds left at the window's pace.
    """

    step_s: float
    tokens_per_s: float
    eta_s: float


class StepClock:
    """Turns the end of each step into a pace, over a moving window of steps.

    The window smooths the noise of single steps and forgets the slow first ones.
    """

    def __init__(
        self, total_steps: int, *, window_steps: int = 20, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the clock; the first step begins now.

        Args:
            total_steps: Steps that this process still has to do.
            window_steps: Steps that an average covers.
            clock: Monotonic seconds.
        """
        self._clock = clock
        self._steps_left = total_steps
        self._ends_s = deque([clock()], maxlen=window_steps + 1)
        self._tokens: deque[int] = deque(maxlen=window_steps)

    def tick(self, tokens: int) -> Pace:
        """Return the pace after a step that consumed `tokens` tokens and ends now."""
        now_s = self._clock()
        step_s = now_s - self._ends_s[-1]
        self._ends_s.append(now_s)
        self._tokens.append(tokens)
        self._steps_left -= 1
        # A clock too coarse to see the step must not divide by zero.
        window_s = max(now_s - self._ends_s[0], 1e-9)
        return Pace(
            step_s=step_s,
            tokens_per_s=sum(self._tokens) / window_s,
            eta_s=max(self._steps_left, 0) * window_s / len(self._tokens),
        )
