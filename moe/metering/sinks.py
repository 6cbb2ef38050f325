"""Where the numbers of a run go while it goes on: every sink of one run sees the same calls.

The console has its own file. A sink that stores experiments elsewhere must never stop, slow down or outlive
training, and never opens a connection that the user did not ask for.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from moe.durable import write_atomically
from moe.metering.jsonl import METRICS_FILE, StepLog
from moe.metering.report import Report

WandbMode = Literal["offline", "online", "disabled"]

# A tracker this many records behind is hanging; a record is about 1 kB, so the queue stays small.
QUEUE_RECORDS = 10_000
FINISH_TIMEOUT_S = 10.0
EXIT_GRACE_S = 1.0


class Sink(Protocol):
    """Takes the numbers of a run. Called on one rank only, from one thread."""

    def start(self, config: Mapping[str, Any], total_steps: int) -> None:
        """Begin a run of `total_steps` optimizer steps, counted over all its starts."""
        ...

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one step; the fields are listed in moe.metering.jsonl."""
        ...

    def finish(self, report: Report | None) -> None:
        """End the run; `report` is None if it did not reach its end."""
        ...


class JsonlSink:
    """Writes `metrics.jsonl` into the run folder."""

    def __init__(self, run_dir: Path, *, resume_step: int = 0) -> None:
        """Open the file, dropping the lines of steps after `resume_step`; see StepLog."""
        self._log = StepLog(run_dir / METRICS_FILE, resume_step=resume_step)

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest record of an earlier start, from which running totals go on."""
        return self._log.last

    def start(self, config: Mapping[str, Any], total_steps: int) -> None:
        """Do nothing: the configuration has its own file."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one step."""
        self._log.write(record)

    def finish(self, report: Report | None) -> None:
        """Close the file; the report has its own."""
        self._log.close()


class WandbSink:
    """Sends the run to Weights & Biases, by default into files of the run folder only.

    Every call to wandb happens in a daemon thread behind a bounded queue, so one that hangs cannot hold up a
    step. The first failure is reported once and ends the tracking, not the training. Nothing is collected
    unasked: no source code, git state, package list, machine or usage statistics, console output or error
    reports.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        run_name: str,
        warn: Callable[[str], None],
        mode: WandbMode = "offline",
        wandb: Any = None,
        finish_timeout_s: float = FINISH_TIMEOUT_S,
    ) -> None:
        """Make the sink.

        Args:
            run_dir: The run folder; wandb's files go into its folder `wandb`.
            project: wandb's project.
            run_name: Name of the run.
            warn: Takes the one message about a failure; may be called from another thread.
            mode: `offline` writes files only, `online` also uploads them, `disabled` does nothing.
            wandb: The `wandb` module; None imports it.
            finish_timeout_s: Longest wait for the tracker at the end, in seconds.
        """
        self._run_dir = run_dir
        self._project = project
        self._run_name = run_name
        self._warn = warn
        self._mode = mode
        self._wandb = wandb
        self._finish_timeout_s = finish_timeout_s
        self._run: Any = None
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE_RECORDS)
        self._on = threading.Event()
        self._switch = threading.Lock()
        self._worker = threading.Thread(target=self._work, name="wandb", daemon=True)

    def start(self, config: Mapping[str, Any], total_steps: int) -> None:
        """Begin to open the tracker's run, in the background."""
        if self._mode != "disabled":
            self._on.set()
            self._worker.start()
            self._submit(lambda: self._open(dict(config)))

    def log(self, record: Mapping[str, Any]) -> None:
        """Queue one step."""
        values = dict(record)
        self._submit(lambda: self._run.log(values, step=values["step"]))

    def finish(self, report: Report | None) -> None:
        """Close the tracker's run; waits for it, but not for long."""
        if self._mode == "disabled":
            return
        self._submit(lambda: self._close(report))
        self._submit(None)
        if self._on.is_set():
            self._worker.join(self._finish_timeout_s)
            if self._worker.is_alive():
                self._give_up(f"it did not finish within {self._finish_timeout_s:g} s")
        if not self._on.is_set():
            _kill_helper_at_exit()

    def _submit(self, call: Callable[[], None] | None) -> None:
        if not self._on.is_set():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up(f"it is {QUEUE_RECORDS} records behind")

    def _work(self) -> None:
        while self._on.is_set() and (call := self._calls.get()) is not None:
            try:
                call()
            # Whatever a tracker raises, training goes on; wandb also calls sys.exit.
            except (Exception, SystemExit) as error:
                self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        with self._switch:
            was_on = self._on.is_set()
            self._on.clear()
        if was_on:
            folder = self._run_dir / "wandb"
            self._warn(f"wandb is off for the rest of this run: {reason}. What it has is kept in {folder}")

    def _open(self, config: dict[str, Any]) -> None:
        # wandb's reports of its own errors have no other switch than this variable.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        if self._wandb is None:
            import wandb

            self._wandb = wandb
        self._run = self._wandb.init(
            project=self._project,
            name=self._run_name,
            config=config,
            dir=str(self._run_dir),
            mode=self._mode,
            id=_run_id(self._run_dir),
            # Offline, wandb only warns of it; the shared id joins the starts of a run when they are uploaded.
            resume="allow" if self._mode == "online" else None,
            settings=self._wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                save_code=False,
                disable_git=True,
                disable_job_creation=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )

    def _close(self, report: Report | None) -> None:
        if report is not None:
            self._run.summary.update(report.model_dump())
        self._run.finish(exit_code=0 if report is not None else 1)


def _run_id(run_dir: Path) -> str:
    """One id for all starts of a run, kept in its folder."""
    path = run_dir / "wandb" / "id.txt"
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()


def _kill_helper_at_exit() -> None:
    """Bound wandb's own exit handler, which waits without limit for the process that wandb started."""
    exiting = threading.Event()
    # Starts now: from Python 3.12 on no thread can start once the interpreter is exiting.
    threading.Thread(target=_kill_helper_after, args=(exiting,), daemon=True).start()
    # Registered after wandb's own handler, so it runs before it.
    atexit.register(exiting.set)


def _kill_helper_after(exiting: threading.Event) -> None:
    exiting.wait()
    time.sleep(EXIT_GRACE_S)
    _kill_helper()


def _kill_helper() -> None:
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()
