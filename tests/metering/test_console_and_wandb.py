"""What a person sees, and that a tracker can neither stop, slow down nor leak a run."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe.metering.console import ConsoleSink, status_line
from moe.metering.report import Report
from moe.metering.sinks import WandbSink

MakeReport = Callable[..., Report]
RECORD = {
    "step": 2,
    "loss": 7.5,
    "tokens": 4096,
    "tokens_per_s": 12345.6,
    "expert_load_max_over_mean": 1.4,
    "energy_j": 100.0,
    "tokens_per_j": 40.96,
    "energy_source": "estimated",
    "energy_validity": "unchecked",
    "power_w": 31.2,
}


def show(*, terminal: bool, estimated: bool = True, report: Report | None = None) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=200, highlight=False)
    sink = ConsoleSink(estimated=estimated, log_interval=2, console=console)
    sink.start({}, 4)
    for step in range(1, 5):
        sink.log(RECORD | {"step": step} | ({"heldout_loss": 7.1} if step == 4 else {}))
    sink.note("a note with [brackets]")
    sink.finish(report)
    return text.getvalue()


def test_status_line_calls_an_estimate_an_estimate() -> None:
    line = status_line(RECORD, eta_s=151.4, estimated=True)
    assert line == (
        "loss 7.5000  12,346 tokens/s  balance 1.40  ~31 W est.  41 tokens/J (estimated)  ETA 0:02:31"
    )
    measured = status_line(RECORD, eta_s=151.4, estimated=False)
    assert "  31 W  41 tokens/J  " in measured
    assert "est" not in measured
    invalid = status_line(
        RECORD | {"energy_validity": "invalid", "tokens_per_j": None}, eta_s=1, estimated=False
    )
    assert invalid.endswith("31 W  ENERGY INVALID  ETA 0:00:01")


def test_status_line_leaves_out_what_was_not_measured() -> None:
    line = status_line({"step": 1, "loss": None, "energy_j": None, "tokens": 5}, eta_s=0, estimated=True)
    assert line == "ETA 0:00:00"


def test_plain_lines_at_the_interval_and_never_markup_or_escape(make_report: MakeReport) -> None:
    lines = show(terminal=False, report=make_report()).splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == [
        "step 2/4",
        "step 4/4",
        "step 4/4",
    ]
    assert "step 4/4  held-out loss 7.1000" in lines
    assert "a note with [brackets]" in lines
    assert "\x1b" not in "".join(lines)


def test_summary_labels_energy(make_report: MakeReport) -> None:
    estimate = show(terminal=False, report=make_report())
    assert "~100 J est.  41 tokens/J (estimated)  boundary node  unchecked" in estimate
    assert "80.0% of the joules in steps that count, over 3 start(s)" in estimate
    measured = show(terminal=False, estimated=False, report=make_report(energy={"source": "rapl"}))
    assert "100 J  41 tokens/J  boundary node" in measured
    assert "estimated" not in measured
    failed = {"total_j": None, "validity": "invalid"}
    assert "energy unknown" in show(terminal=False, report=make_report(energy=failed, tokens_per_j=None))
    invalid = {"source": "rapl", "validity": "invalid", "validity_detail": "two figures"}
    text = show(terminal=False, estimated=False, report=make_report(energy=invalid, tokens_per_j=None))
    assert "100 J  boundary node  INVALID, not to be quoted: two figures" in text
    assert "tokens/J" not in text.splitlines()[-2]


def test_terminal_shows_a_live_bar() -> None:
    text = show(terminal=True)
    assert "4/4" in text
    assert "~31 W est." in text
    assert "a note with [brackets]" in text


class FakeRun:
    """Records calls as wandb's run would take them."""

    def __init__(self, owner: FakeWandb) -> None:
        self.owner = owner
        self.summary: dict[str, Any] = {}

    def log(self, values: dict[str, Any], step: int) -> None:
        if step == self.owner.fail_at_step:
            raise OSError("no space left on device")
        self.owner.logged.append(step)

    def finish(self, exit_code: int) -> None:
        self.owner.exit_code = exit_code


class FakeWandb:
    def __init__(self, *, init_error: BaseException | None = None, fail_at_step: int = -1) -> None:
        self.init_error = init_error
        self.fail_at_step = fail_at_step
        self.hang = threading.Event()
        self.hang.set()
        self.logged: list[int] = []
        self.exit_code: int | None = None
        self.run = FakeRun(self)

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **arguments: Any) -> FakeRun:
        self.hang.wait()
        if self.init_error:
            raise self.init_error
        return self.run


@pytest.fixture(autouse=True)
def _restore_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "as before")


def run_through(
    wandb: FakeWandb, run_dir: Path, *, report: Report | None = None, steps: int = 5, timeout_s: float = 5.0
) -> list[str]:
    warnings: list[str] = []
    sink = WandbSink(
        run_dir, project="p", run_name="n", warn=warnings.append, wandb=wandb, finish_timeout_s=timeout_s
    )
    sink.start({"seed": 1}, steps)
    for step in range(1, steps + 1):
        sink.log({"step": step, "loss": 1.0})
    sink.finish(report)
    return warnings


def test_wandb_takes_every_step_and_the_report(tmp_path: Path, make_report: MakeReport) -> None:
    wandb = FakeWandb()
    assert run_through(wandb, tmp_path, report=make_report()) == []
    assert wandb.logged == [1, 2, 3, 4, 5]
    assert wandb.run.summary["tokens_per_j"] == 40.96
    assert wandb.exit_code == 0


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(1)])
def test_wandb_init_failure_is_one_warning(tmp_path: Path, error: BaseException) -> None:
    warnings = run_through(FakeWandb(init_error=error), tmp_path)
    assert len(warnings) == 1
    assert type(error).__name__ in warnings[0]


def test_wandb_disk_full_ends_tracking_not_training(tmp_path: Path) -> None:
    wandb = FakeWandb(fail_at_step=3)
    warnings = run_through(wandb, tmp_path)
    assert wandb.logged == [1, 2]
    assert len(warnings) == 1
    assert "no space left" in warnings[0]


def test_wandb_that_hangs_delays_no_step_and_the_end_only_briefly(tmp_path: Path) -> None:
    wandb = FakeWandb()
    wandb.hang.clear()
    start_s = time.monotonic()
    # More records than the queue holds: a full queue must not block either.
    warnings = run_through(wandb, tmp_path, steps=10_050, timeout_s=0.2)
    elapsed_s = time.monotonic() - start_s
    wandb.hang.set()
    assert elapsed_s < 2.0
    assert len(warnings) == 1
    assert "behind" in warnings[0]


def test_wandb_disabled_starts_nothing(tmp_path: Path) -> None:
    sink = WandbSink(tmp_path, project="p", run_name="n", warn=pytest.fail, mode="disabled")
    sink.start({}, 1)
    sink.log({"step": 1})
    sink.finish(None)
    assert list(tmp_path.iterdir()) == []


TRACKED_RUN = """
import sys
from pathlib import Path

def watch(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
        if isinstance(address, tuple) and not str(address[0]).startswith(("127.", "localhost", "::1")):
            print("CONNECT", address, flush=True)
    elif event == "socket.getaddrinfo":
        print("RESOLVE", arguments[0], flush=True)

sys.addaudithook(watch)
from moe.metering.sinks import WandbSink
run_dir, mode = Path(sys.argv[1]), sys.argv[2]
sink = WandbSink(run_dir, project="p", run_name="canary-run", mode=mode, finish_timeout_s=float(sys.argv[3]),
                 warn=lambda text: print("WARNING", text, flush=True))
sink.start({"seed": 1}, 5)
for step in range(1, 6):
    sink.log({"step": step, "loss": 1.0 / step})
sink.finish(None)
print("finished", flush=True)
"""


class CountingProxy:
    """Takes every connection that a program makes through its HTTP proxy, and never answers."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.taken: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            try:
                self.taken.append(self.socket.accept()[0])
            except OSError:
                return


@pytest.fixture
def proxy() -> Iterator[CountingProxy]:
    counting = CountingProxy()
    yield counting
    counting.socket.close()
    for taken in counting.taken:
        taken.close()


def tracked_run(run_dir: Path, mode: str, proxy: CountingProxy, *, timeout_s: float) -> tuple[str, float]:
    """Run the real wandb in a process whose HTTP traffic, its helper's included, must pass the proxy."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy.url)
    environment |= {"WANDB_API_KEY": "a" * 40, "HOME": str(run_dir), "NO_PROXY": "", "no_proxy": ""}
    start_s = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", TRACKED_RUN, str(run_dir), mode, str(timeout_s)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return result.stdout + result.stderr, time.monotonic() - start_s


def test_real_wandb_offline_writes_files_and_opens_no_connection(
    tmp_path: Path, proxy: CountingProxy
) -> None:
    output, _ = tracked_run(tmp_path, "offline", proxy, timeout_s=30)
    assert output.strip() == "finished"
    assert proxy.taken == []
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"canary-run" in content
    assert b"loss" in content
    for private in (sys.executable, "a" * 40):
        assert private.encode() not in content


def test_real_wandb_online_without_answer_holds_up_nothing(tmp_path: Path, proxy: CountingProxy) -> None:
    output, elapsed_s = tracked_run(tmp_path, "online", proxy, timeout_s=2)
    # Also shows that the proxy sees what the offline run must not do.
    assert proxy.taken
    assert output.count("WARNING") == 1
    assert "finished" in output
    assert "Traceback" not in output
    assert elapsed_s < 20
