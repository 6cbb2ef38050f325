"""Ranks for tests: processes that start once and run one test function after another.

    pool = RankPool(4)
    losses = pool.run(train_two_steps, config, num_ranks=2)   # [result of rank 0, result of rank 1]

Every run is a job of its own: it gets a new rendezvous and, unless told otherwise, a new default process
group over gloo. Only the loopback interface is used. Ranks are forked from a server that has imported torch
but has never computed with it, so that the seconds of imports are paid once a session and not once a rank.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest.mock import patch

# When one rank has failed, the others may wait for it in a collective: how long they have to return.
GRACE_S = 5.0


class RankError(AssertionError):
    """A rank raised, was lost or did not return; the text has its rank and traceback."""


@dataclass(frozen=True)
class _Job:
    """What a rank is told. `args` are pickled apart: they may need the module, which is loaded first."""

    module: str
    path: str
    function: str
    args: bytes
    num_ranks: int
    port: int
    timeout_s: float


class RankPool:
    """Processes that serve as the ranks of one small job after another."""

    def __init__(
        self,
        num_ranks: int,
        *,
        init_process_group: bool = True,
        preload: Sequence[str] = ("torch.distributed",),
    ) -> None:
        """Nothing starts before the first run.

        Args:
            num_ranks: processes.
            init_process_group: False leaves torch.distributed to the function. RANK, WORLD_SIZE, MASTER_ADDR
                and MASTER_PORT are set for it either way, as torchrun sets them.
            preload: modules that the server imports. There is one server a session: the first pool that
                starts decides, and the ranks of later ones import what they lack.
        """
        self.num_ranks = num_ranks
        self.init_process_group = init_process_group
        self.preload = preload
        self._ranks: list[tuple[Any, Connection]] = []  # process and our end of its pipe
        self._folder = TemporaryDirectory(prefix="ranks_pool_")

    def run(
        self, function: Callable[..., Any], *args: Any, num_ranks: int | None = None, timeout_s: float = 120.0
    ) -> list[Any]:
        """Call the function with the arguments on every rank at once; its results in rank order.

        Args:
            function: defined at the top level of a test file or of a module.
            args: the same on every rank, picklable like the results. Tensors travel as copies.
            num_ranks: use only the first ranks of the pool, as a smaller job.
            timeout_s: after this the pool is killed; the next run starts a new one.

        Raises:
            RankError: for any rank that raised, ended or hung.
        """
        num_ranks = num_ranks or self.num_ranks
        if not self._ranks:
            self._start()
        store = _open_store()
        job = _describe(function, args, num_ranks, store.port, timeout_s)
        for _, pipe in self._ranks[:num_ranks]:
            with suppress(BrokenPipeError):  # it has ended since the last run; _collect says so
                pipe.send(job)
        return self._collect(num_ranks, timeout_s)

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()
        for process, _ in self._ranks:
            process.join()
        self._ranks = []

    def _start(self) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(list(self.preload))
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            args = (theirs, rank, self._stack_path(rank), self.init_process_group)
            process = context.Process(target=_serve, args=args, daemon=True)
            # The server takes its environment from here when it starts, and torch its threads from that.
            with patch.dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""):
                process.start()
            theirs.close()  # so that the end of the process is seen as the end of the pipe
            self._ranks.append((process, ours))

    def _collect(self, num_ranks: int, timeout_s: float) -> list[Any]:
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks[:num_ranks])}
        results: list[Any] = [None] * num_ranks
        failures: list[str] = []
        deadline = time.monotonic() + timeout_s
        while waiting and (ready := connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                error, results[rank] = self._receive(rank)
                if error:
                    failures.append(f"rank {rank} of {num_ranks} {error}")
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        for rank in sorted(waiting.values()):
            what = "then waited for another" if failures else f"did not return in {timeout_s:g} s"
            failures.append(f"rank {rank} of {num_ranks} {what} and was killed at\n{self._stack(rank)}")
        if failures:
            self.close()  # the ranks that are left may be out of step
            raise RankError("\n".join(failures))
        return results

    def _receive(self, rank: int) -> tuple[str | None, Any]:
        process, pipe = self._ranks[rank]
        try:
            error, result = pickle.loads(pipe.recv_bytes())
        except EOFError:
            process.join()
            return f"ended with exit code {process.exitcode}", None
        return (f"raised\n{error}" if error else None), result

    def _stack(self, rank: int) -> str:
        os.kill(self._ranks[rank][0].pid, signal.SIGUSR1)
        time.sleep(0.2)
        stack = self._stack_path(rank)
        return stack.read_text() if stack.exists() else "its start"

    def _stack_path(self, rank: int) -> Path:
        return Path(self._folder.name) / f"stack_of_rank_{rank}"


def _open_store() -> Any:
    """A rendezvous server on a free port of the loopback interface, in this process: no port can be taken by
    another program between choosing and using it.
    """
    from torch.distributed import TCPStore

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        use_libuv=False,
    )


def _describe(function: Callable[..., Any], args: Any, num_ranks: int, port: int, timeout_s: float) -> _Job:
    path = sys.modules[function.__module__].__file__
    assert path is not None
    assert function.__qualname__.isidentifier(), f"{function.__qualname__} is not at the top level of {path}"
    # pickle, not the pipe's own: torch teaches that one to share memory, which dies with the sender.
    return _Job(
        function.__module__, path, function.__qualname__, pickle.dumps(args), num_ranks, port, timeout_s
    )


def _serve(pipe: Connection, rank: int, stack_path: Path, init_process_group: bool) -> None:
    """The life of a rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it kills the ranks
    stack_file = stack_path.open("w")  # stays open as long as the process
    faulthandler.register(signal.SIGUSR1, file=stack_file)
    os.environ.update(
        GLOO_SOCKET_IFNAME="lo",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        TORCHELASTIC_USE_AGENT_STORE="True",  # rank 0 too connects to the parent's store, serves none
    )
    gc.freeze()  # what was imported; collections between jobs look at the rest only
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send_bytes(_attempt(job, init_process_group))


def _attempt(job: _Job, init_process_group: bool) -> bytes:
    """Pickled (traceback or None, result or None)."""
    try:
        return pickle.dumps((None, _call(job, init_process_group)))
    except BaseException:
        return pickle.dumps((traceback.format_exc(), None))


def _call(job: _Job, init_process_group: bool) -> Any:
    from datetime import timedelta

    import torch.distributed as dist

    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(job.num_ranks)
    os.environ["MASTER_PORT"] = str(job.port)
    function = getattr(_load(job.module, job.path), job.function)
    args = pickle.loads(job.args)
    # The group of the last job. Not at its end: who leaves early breaks the connections of slower ranks.
    _leave_process_group()
    gc.collect()  # with its groups go their threads
    if init_process_group:
        dist.init_process_group("gloo", timeout=timedelta(seconds=job.timeout_s))
    try:
        return function(*args)
    except BaseException:
        _leave_process_group()  # here that is wanted: the others must not wait for this rank
        raise


def _leave_process_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _load(name: str, path: str) -> ModuleType:
    """The module under the name that it has in the parent, so that its classes can be pickled both ways.

    By path: pytest's importlib mode gives test files names that nothing else can import.
    """
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
