"""An orderly stop: a scheduler's signal becomes a checkpoint and exit code 5 within its grace time.

A signal may reach one rank only (one evicted pod), so the ranks agree after every step. Whoever restarts the
command with `--auto-resume` loses no step.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

from moe.errors import RunStoppedError

if TYPE_CHECKING:
    import torch


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self, *signals: signal.Signals) -> None:
        """Take the signals as requests from now on; to be called in the main thread.

        A launcher may have blocked them, so that none is lost, and deadly, while Python starts.
        """
        for number in signals:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        # Only noted: the weights are whole between two steps. A second signal must not break the save.
        self.requested = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; collective, one integer over the default group."""
        import torch
        import torch.distributed as dist

        flag = torch.tensor(int(self.requested), dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def stopped(run_dir: object, step: int) -> RunStoppedError:
    """What a run that stopped on request ends with."""
    return RunStoppedError(
        f"stopped on request after step {step}, its checkpoint is written; go on with `moe resume {run_dir}`"
    )
