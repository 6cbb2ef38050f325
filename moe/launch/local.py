"""Several ranks on this machine."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from moe.checkpoint.store import list_complete
from moe.errors import RankLostError

PARENT_CHECK_INTERVAL_S = 1.0


def launch_local(
    arguments: Sequence[str],
    *,
    num_ranks: int,
    run_dir: Path,
    note: Callable[[str], None],
    max_restarts: int = 0,
) -> None:
    """Run `python -m moe arguments` as num_ranks ranks and wait for all of them.

    Ranks talk over the loopback interface only. If one is lost, the others are ended within seconds.

    Args:
        arguments: argv; no shell is involved.
        num_ranks: processes to start.
        run_dir: folder of the run, whose checkpoints show progress.
        note: told of every restart.
        max_restarts: see NodeJob; the arguments must then be such that a second start goes on.

    Raises:
        MoeError: see run_node.
    """
    from moe.launch.agent import NodeJob, run_node

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing of a local job listens to the network
    share_cores(num_ranks)
    job = NodeJob(
        arguments=arguments,
        nodes=1,
        ranks=num_ranks,
        endpoint="localhost:0",
        job_id=uuid.uuid4().hex,
        max_restarts=max_restarts,
        newest_step=lambda: newest_step(run_dir),
        local_address="127.0.0.1",
        join_timeout_s=60,
    )
    run_node(job, note)


def share_cores(num_ranks: int) -> None:
    """Let the ranks of this machine share its cores, where the user has not set OMP_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_ranks)))


def newest_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint of a run; -1 without one."""
    complete = list_complete(run_dir / "checkpoints")
    return int(complete[0].name.split("_")[1].partition(".")[0]) if complete else -1


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
