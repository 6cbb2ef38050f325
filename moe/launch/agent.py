"""One node's part of a job: starts its ranks, watches them, restarts what a restart can heal, stops in order.

torch's elastic agent does the work: nodes meet at a c10d rendezvous, and when a rank fails or a node comes
back, all nodes start their ranks again. This adds what it lacks: a rule for which failures are worth a
restart, a limit on restarts without progress, and a scheduler's signal passed on as a request to stop.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from moe.errors import (
    CorruptDataError,
    InputError,
    MoeError,
    RankLostError,
    RunInterruptedError,
    RunStoppedError,
)

# The first rank to fail is noticed after at most this long; then the others are ended.
MONITOR_INTERVAL_S = 0.1
# What a rank takes as a request to stop (moe/train/stop.py). SIGTERM still ends a rank at once: the agent
# sends it to ranks that may hang in a collective because another rank is gone.
STOP_RANK = signal.SIGUSR1
# What schedulers send to the agent: Kubernetes and Slurm's preemption SIGTERM, our sbatch SIGUSR1.
STOP_AGENT = (signal.SIGTERM, signal.SIGUSR1)
GO_ON = "Continue from the newest checkpoint with `moe resume`"
INTERRUPTED = "interrupted; continue from the newest checkpoint with `moe resume`"

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class NodeJob:
    """What one node runs.

    Attributes:
        arguments: argv of `python -m moe` for every rank; no shell is involved.
        nodes: Nodes of the job.
        ranks: Ranks of this node.
        endpoint: host:port of one of the nodes, where all meet.
        job_id: The same on all nodes, another one for each start of the job.
        max_restarts: Restarts in a row without a new checkpoint before the job gives up.
        newest_step: Step of the newest checkpoint, by which progress is seen.
        local_address: What the other nodes call this one; None asks the system.
        is_host: Whether the endpoint is on this node; None asks the system.
        join_timeout_s: How long nodes wait for each other.
    """

    arguments: Sequence[str]
    nodes: int
    ranks: int
    endpoint: str
    job_id: str
    max_restarts: int
    newest_step: Callable[[], int]
    local_address: str | None = None
    is_host: bool | None = None
    join_timeout_s: int = 900


class RankFailedError(MoeError):
    """A rank ended by itself with an error, which it printed; carries that rank's exit code."""

    def __init__(self, rank: int, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(f"rank {rank} ended with exit code {exit_code}; its message is above")


def run_node(job: NodeJob, note: Note) -> bool:
    """Run this node's ranks to the end of the job; call it in the main thread.

    SIGTERM or SIGUSR1 asks all ranks of the job to write a checkpoint and end; SIGINT ends them at once.

    Returns:
        Whether a stop was requested, though the ranks were done before they took notice.

    Raises:
        RunStoppedError: the ranks stopped on request.
        RankLostError: a rank was killed, and restarts did not help; the text names rank, process and signal.
        RankFailedError: a rank ended with an error of its own.
        RunInterruptedError: the user ended the job.
    """
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)  # our own messages say it
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"  # the others are ours
    # Each start of the ranks gets a store of its own. In the shared one, torch 2.13 names a start by the
    # restarts that a node has counted, and a node that restarts for another node's sake counts none: its
    # ranks would read the addresses of the start before.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        result, stopping = _run(job, note)
    except (SignalException, KeyboardInterrupt) as error:  # the ranks were ended
        raise RunInterruptedError(INTERRUPTED) from error
    except RendezvousError as error:
        raise RankLostError(
            f"the {job.nodes} node(s) did not meet at {job.endpoint}: {error.__cause__ or error}. "
            "Check that the address is one of the nodes, its port is open, and all nodes were started"
        ) from error
    if result.is_failed():
        codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        pids = {rank: failure.pid for rank, failure in result.failures.items()}
        raise cause(codes, pids)
    return stopping


def _run(job: NodeJob, note: Note) -> tuple[RunResult, bool]:
    rendezvous = get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d",
            endpoint=job.endpoint,
            run_id=job.job_id,
            min_nodes=job.nodes,
            max_nodes=job.nodes,
            local_addr=job.local_address,
            join_timeout=job.join_timeout_s,
            read_timeout=job.join_timeout_s,  # of the first connection, too: the other node may start later
            **({} if job.is_host is None else {"is_host": job.is_host}),
        )
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=job.ranks,
        entrypoint=sys.executable,
        args=("-u", "-m", "moe", *job.arguments),
        rdzv_handler=rendezvous,
        max_restarts=job.max_restarts,
        monitor_interval=MONITOR_INTERVAL_S,
        local_addr=job.local_address,
    )
    agent = NodeAgent(spec, job.newest_step, note)
    for number in STOP_AGENT:
        signal.signal(number, agent.on_stop_signal)
    result: RunResult = agent.run()
    rendezvous.shutdown()  # not after a signal: the other nodes may go on with one that replaces this
    return result, agent.stopping


class NodeAgent(LocalElasticAgent):
    """torch's agent with a rule for restarts and an orderly stop."""

    def __init__(self, spec: WorkerSpec, newest_step: Callable[[], int], note: Note) -> None:
        super().__init__(spec, DefaultLogsSpecs())
        self._newest_step = newest_step
        self._note = note
        self._step_at_failure = newest_step()
        self._ranks: Literal["none", "starting", "running"] = "none"
        self.stopping = False

    def on_stop_signal(self, _number: int, _frame: FrameType | None) -> None:
        """Pass the request on to the ranks; without ranks there is nothing to save."""
        self.stopping = True
        if self._ranks == "none":
            raise RunStoppedError("stopped on request before the ranks ran; start the job again to go on")
        if self._ranks == "running":
            self._ask_ranks()

    def _ask_ranks(self) -> None:
        assert self._pcontext is not None
        for pid in self._pcontext.pids().values():
            with suppress(ProcessLookupError):
                os.kill(pid, STOP_RANK)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._ranks = "starting"
        # Ranks inherit the mask: a request that meets them before they listen waits instead of killing them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {STOP_RANK})
        try:
            started: dict[int, Any] = super()._start_workers(worker_group)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._ranks = "running"
        if self.stopping:
            self._ask_ranks()
        return started

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._ranks = "none"
        super()._stop_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            self._remaining_restarts = self._restarts_left(result)
        return result

    def _restarts_left(self, result: RunResult) -> int:
        """Restarts that this failure may still use; a new checkpoint since the last one gives all back."""
        codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        if self.stopping or not worth_a_restart(codes.values()):
            return 0
        step = self._newest_step()
        limit = self._worker_group.spec.max_restarts
        left = limit if step > self._step_at_failure else self._remaining_restarts
        self._step_at_failure = step
        if left > 0:
            pids = {rank: failure.pid for rank, failure in result.failures.items()}
            what = str(cause(codes, pids)).removesuffix(GO_ON).rstrip(". ")
            self._note(f"{what}; starting all ranks again, restart {limit - left + 1} of {limit}")
        return left


def worth_a_restart(exit_codes: Iterable[int]) -> bool:
    """Whether the same command may succeed the next time: not after bad input, corrupt data or a stop."""
    hopeless = {kind.exit_code for kind in (InputError, CorruptDataError, RunStoppedError)}
    return hopeless.isdisjoint(exit_codes)


def cause(exit_codes: Mapping[int, int], pids: Mapping[int, int]) -> MoeError:
    """The failure that explains the others: a killed rank, else a rank's own error, else a lost one.

    Args:
        exit_codes: Of the failed ranks; negative is the signal that ended one.
        pids: Their processes.
    """
    if RunStoppedError.exit_code in exit_codes.values():
        return RunStoppedError("all ranks stopped on request; start the job again to go on")
    # SIGTERM is what the others get when one has failed.
    killed = [rank for rank, code in exit_codes.items() if code < 0 and code != -signal.SIGTERM]
    if killed:
        rank = killed[0]
        name = signal.Signals(-exit_codes[rank]).name
        return RankLostError(
            f"rank {rank} (process {pids[rank]}) was killed by {name}; the other ranks were ended. {GO_ON}"
        )
    own = [rank for rank, code in exit_codes.items() if code > 0 and code != RankLostError.exit_code]
    if own:
        return RankFailedError(min(own), exit_codes[min(own)])
    return RankLostError(
        f"ranks {', '.join(map(str, sorted(exit_codes)))} lost contact with another rank or were terminated; "
        f"what they said is above. {GO_ON}"
    )
