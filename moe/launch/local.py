"""Several ranks on this machine, started and watched through torch's elastic API."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence

from moe.errors import MoeError, RankLostError, RunInterruptedError

# The first rank to fail is noticed after at most this long; then the others are ended.
MONITOR_INTERVAL_S = 0.1
PARENT_CHECK_INTERVAL_S = 1.0

INTERRUPTED = "interrupted; continue from the newest checkpoint with `moe resume`"


class RankFailedError(MoeError):
    """A rank ended by itself with an error, which it printed; carries that rank's exit code."""

    def __init__(self, rank: int, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(f"rank {rank} ended with exit code {exit_code}; its message is above")


def launch_local(module: str, arguments: Sequence[str], *, num_ranks: int) -> None:
    """Run `python -m module arguments` as num_ranks ranks and wait for all of them.

    Ranks talk over the loopback interface only. If one is lost, the others are ended within seconds.

    Args:
        module: a module with a main guard that reads RANK and WORLD_SIZE.
        arguments: its argv; no shell is involved.
        num_ranks: processes to start.

    Raises:
        RankLostError: a rank was killed; the text names rank, process and signal.
        RankFailedError: a rank ended with an error of its own.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)  # our own message says it
    _set_defaults(num_ranks)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"timeout": 60},
        max_restarts=0,
        monitor_interval=MONITOR_INTERVAL_S,
        local_addr="127.0.0.1",
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
    except SignalException as error:  # Ctrl-C or SIGTERM to this process; the ranks were ended
        raise RunInterruptedError(INTERRUPTED) from error
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        pids = {rank: failure.pid for rank, failure in error.failures.items()}
        raise _cause(codes, pids) from None


def _cause(exit_codes: Mapping[int, int], pids: Mapping[int, int]) -> MoeError:
    """The failure that explains the others: a killed rank, else a rank's own error, else a lost one."""
    # SIGTERM is what the others get when one has failed.
    killed = [rank for rank, code in exit_codes.items() if code < 0 and code != -signal.SIGTERM]
    if killed:
        rank = killed[0]
        name = signal.Signals(-exit_codes[rank]).name
        return RankLostError(
            f"rank {rank} (process {pids[rank]}) was killed by {name}; the other ranks were ended. "
            "Continue from the newest checkpoint with `moe resume`"
        )
    own = [rank for rank, code in exit_codes.items() if code > 0 and code != RankLostError.exit_code]
    if own:
        return RankFailedError(min(own), exit_codes[min(own)])
    return RankLostError(
        f"ranks {', '.join(map(str, sorted(exit_codes)))} lost contact with another rank or were terminated; "
        "what they said is above. Continue from the newest checkpoint with `moe resume`"
    )


def _set_defaults(num_ranks: int) -> None:
    """Environment of the ranks, where the user has not set it."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_ranks)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing of a local job listens to the network


def end_with_parent() -> None:
    """End this rank when the process that started it is gone.

    A launcher that is killed cannot end its ranks; left alone they would go on writing into a folder that a
    resumed run writes into as well.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_INTERVAL_S)
        os._exit(RankLostError.exit_code)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
