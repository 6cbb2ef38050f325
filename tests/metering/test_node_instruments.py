"""Instruments of whole machines: the operator's command, its two ready readers, and AMD's boards."""

from __future__ import annotations

import json
import math
import netrc
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fake_nvml import Clock

from moe.errors import InputError
from moe.metering.amd import AmdBoards
from moe.metering.choose import choose_meter
from moe.metering.command_meter import COUNTER_STALL_S, CommandMeter
from moe.metering.energy import EnergyMeterError
from moe.metering.estimate import PowerModel
from moe.metering.gpu_meter import GpuMeter
from moe.metering.node_readers import _authorization, main
from moe.metering.over_machines import node_level, steps_of_starts, too_coarse

MODEL = PowerModel(idle_w=1, active_w_per_core=1, provenance="this test")


@pytest.fixture
def answer(tmp_path: Path) -> Path:
    """What the operator's program prints; `cat` is such a program."""
    path = tmp_path / "answer"
    path.write_text("6512.5 W\n")
    return path


def say(path: Path, text: str) -> None:
    """Replace a file that the side thread may be reading: it sees the old text or the new one."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def wait_for(meter: CommandMeter, enough: float) -> float:
    deadline_s = time.monotonic() + 10
    while (energy_j := meter.read().energy_j) < enough:
        assert time.monotonic() < deadline_s, energy_j
        time.sleep(0.01)
    return energy_j


def test_command_in_watts_is_integrated(answer: Path) -> None:
    clock = Clock()
    meter = CommandMeter(["cat", str(answer)], clock=clock, period_s=60)
    clock.now_s += 2
    assert meter.read().energy_j == pytest.approx(13_025)
    assert (meter.source, meter.boundary, meter.idle_w) == ("command", "node", 6512.5)
    assert meter.audit().validity == "unchecked"
    clock.now_s += 100
    audit = meter.audit()
    assert (audit.validity, "not sampled for 102.0" in audit.detail) == ("invalid", True)
    meter.close()


def test_command_in_joules_is_a_counter_that_may_only_grow(answer: Path) -> None:
    answer.write_text("1000000 J\n")
    meter = CommandMeter(["cat", str(answer)], period_s=0.01)
    say(answer, "1000750 J\n")
    assert wait_for(meter, 1) == 750
    assert meter.audit().validity == "unchecked"
    say(answer, "12 J\n")
    meter._sampler._thread.join(timeout=10)
    with pytest.raises(EnergyMeterError, match=r"fell from 1000750\.0 to 12\.0 J"):
        meter.read()
    assert meter.audit().validity == "invalid"
    meter.close()


def test_command_whose_counter_stands_still_is_flagged(answer: Path) -> None:
    answer.write_text("1000000 J\n")
    clock = Clock()
    meter = CommandMeter(["cat", str(answer)], clock=clock, period_s=60)
    clock.now_s += COUNTER_STALL_S + 1
    audit = meter.audit()
    assert (audit.validity, "stands still since 901 s" in audit.detail) == ("invalid", True)
    meter.close()


@pytest.mark.parametrize(
    ("step_j", "steps", "starts", "is_coarse"),
    [
        (3_600_000, 0, 1, True),
        (3_600_000, 20, 1, True),
        (3_600_000, 40, 1, False),
        (3_600_000, 40, 2, True),  # both starts have ends
    ],
)
def test_counter_whose_steps_are_coarse_for_the_run_is_flagged_at_the_end(
    step_j: int, steps: int, starts: int, is_coarse: bool, answer: Path
) -> None:
    answer.write_text("1000000 J\n")
    meter = CommandMeter(["cat", str(answer)], period_s=0.005)
    for step in range(1, steps + 1):
        say(answer, f"{1_000_000 + step * step_j} J\n")
        wait_for(meter, step * step_j)
    assert meter.audit().validity == "unchecked"
    said = too_coarse(steps_of_starts([meter.step_j()] * starts), meter.read().energy_j)
    meter.close()
    assert ("too coarse for this run" in str(said)) == is_coarse


@pytest.mark.parametrize(
    ("steps_j", "unsure_j"),
    [
        ([0, 0], 0),  # watts
        ([5, 3], 8),
        ([5, 3, math.inf], 13),
        ([math.inf, 3], 6),
        ([math.inf], math.inf),
        ([0, math.inf], math.inf),  # watts say nothing about a counter
        ([math.nan, 3], 6),  # a journal from before steps were kept
        ([math.nan, math.inf], math.inf),
        ([math.nan, 0], 0),
    ],
)
def test_start_that_saw_no_step_is_as_unsure_as_the_worst_that_did(
    steps_j: list[float], unsure_j: float
) -> None:
    assert steps_of_starts(steps_j) == unsure_j


def test_a_short_last_start_is_judged_with_the_joules_of_all_starts() -> None:
    """With 3.6 MJ steps 500 MJ of three starts are fine, 10 MJ of the last one alone would not be."""
    assert too_coarse(3 * 3.6e6, 500e6) is None
    assert too_coarse(3.6e6, 10e6) is not None
    assert node_level("counter", [], 500e6, unsure_j=3 * 3.6e6).basis == "measured"
    assert node_level("counter", [], 500e6, unsure_j=5 * 3.6e6).basis == "unknown"
    assert too_coarse(0.0, 0.0) is None  # watts


def test_command_that_begins_to_fail_is_an_error_not_a_zero(answer: Path) -> None:
    meter = CommandMeter(["cat", str(answer)], period_s=0.01)
    answer.unlink()
    meter._sampler._thread.join(timeout=10)
    with pytest.raises(EnergyMeterError, match="ended with 1"):
        meter.read()
    meter.close()


@pytest.mark.parametrize("text", ["", "6512.5", "0 W", "-5 W", "12 W\n13 W", "12 kW", "power: 12 W"])
def test_command_that_prints_no_watts_is_refused(text: str, answer: Path) -> None:
    answer.write_text(text)
    with pytest.raises(InputError, match=r"energy\.node_command does not work.*6512\.5 W"):
        CommandMeter(["cat", str(answer)])


def test_command_that_hangs_ends_at_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe.metering.command_meter.TIMEOUT_S", 0.2)
    with pytest.raises(InputError, match="timed out"):
        CommandMeter(["sleep", "60"])


def test_reader_never_waits_for_a_slow_command(tmp_path: Path) -> None:
    slow = tmp_path / "slow.sh"
    slow.write_text("echo 100 W\n")
    meter = CommandMeter(["sh", str(slow)], period_s=0.01)
    say(slow, "sleep 1\necho 100 W\n")
    time.sleep(0.1)
    start_s = time.monotonic()
    meter.read()
    assert time.monotonic() - start_s < 0.5
    meter.close()


def test_auto_takes_the_command_on_a_cpu(answer: Path, tmp_path: Path) -> None:
    meter = choose_meter(
        "auto",
        gpu_uuids=[],
        pids=[],
        power_model=MODEL,
        command=["cat", str(answer)],
        powercap_root=tmp_path,
    )
    meter.close()
    assert meter.source == "command"


class Bmc(BaseHTTPRequestHandler):
    """A BMC's Redfish service, as far as the reader asks it."""

    resources: ClassVar[dict[str, Any]] = {
        "/redfish/v1/Chassis/1/Power": {"PowerControl": [{"PowerConsumedWatts": 6512.5}]},
        "/redfish/v1/Chassis/1/EnvironmentMetrics": {"PowerWatts": {"Reading": 700}},
        "/redfish/v1/Chassis/1": {"Name": "chassis"},
    }

    def do_GET(self) -> None:
        if self.path.endswith("/Moved"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("/Moved", "/Power"))
            self.end_headers()
            return
        resource = self.resources.get(self.path)
        self.send_response(404 if resource is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps(resource).encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def bmc() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Bmc)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/redfish/v1/Chassis/1"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("resource", "code", "text"),
    [
        ("/Power", 0, "6512.5 W\n"),
        ("/EnvironmentMetrics", 0, "700 W\n"),
        ("", 1, "neither PowerControl"),
        ("/Nothing", 1, "404"),
        ("/Moved", 1, "302"),
    ],
)
def test_redfish_reader(
    resource: str, code: int, text: str, bmc: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["redfish", bmc + resource]) == code
    out, err = capsys.readouterr()
    assert (out == text and err == "") if code == 0 else (out == "" and text in err)


def write_netrc(home: Path, text: str) -> None:
    (home / ".netrc").write_text(text)
    (home / ".netrc").chmod(0o600)


def test_redfish_reader_goes_through_no_proxy(
    bmc: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert main(["redfish", f"{bmc}/Power"]) == 0
    assert capsys.readouterr().out == "6512.5 W\n"


def test_password_goes_to_its_own_host_over_https_alone(
    bmc: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_netrc(tmp_path, "machine 127.0.0.1 login root password secret\ndefault login me password other\n")
    assert main(["redfish", f"{bmc}/Power"]) == 1
    message = capsys.readouterr().err
    assert ("over https:// only" in message, "secret" in message) == (True, False)
    assert _authorization("https://127.0.0.1/redfish") == {"Authorization": "Basic cm9vdDpzZWNyZXQ="}
    assert netrc.netrc().authenticators("bmc.example") == ("me", "", "other")
    assert _authorization("https://bmc.example/redfish") == {}


def test_redfish_reader_takes_no_file_for_a_bmc(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["redfish", "file:///etc/hostname"]) == 1
    assert "https://" in capsys.readouterr().err


def test_ipmi_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    tool = tmp_path / "ipmitool"
    tool.write_text("#!/bin/sh\necho '    Instantaneous power reading:                   220 Watts'\n")
    tool.chmod(0o755)
    assert main(["ipmi"]) == 0
    assert capsys.readouterr().out == "220 W\n"
    tool.write_text("#!/bin/sh\necho no BMC >&2; exit 1\n")
    assert main(["ipmi"]) == 1
    assert "no BMC" in capsys.readouterr().err


def test_ready_reader_works_as_the_command(bmc: str) -> None:
    argv = [sys.executable, "-m", "moe.metering.node_readers", "redfish", f"{bmc}/Power"]
    meter = CommandMeter(argv, period_s=60)
    meter.close()
    assert meter.idle_w == 6512.5


class FakeSmi:
    """The names of amdsmi that the boards use: two GPUs, counters in units of 15.3 microjoules."""

    class AmdSmiException(Exception):
        pass

    class AmdSmiInitFlags:
        INIT_AMD_GPUS = 2

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.power: dict[str, Any] = {"average_socket_power": "N/A", "current_socket_power": 700}
        self.broken = False
        self.sessions = 0

    def amdsmi_init(self, flags: int) -> None:
        self.sessions += 1

    def amdsmi_shut_down(self) -> None:
        self.sessions -= 1

    def amdsmi_get_processor_handles(self) -> list[str]:
        return ["0000:C1:00.0", "0000:C2:00.0"]

    def amdsmi_get_gpu_device_bdf(self, handle: str) -> str:
        return handle

    def amdsmi_get_energy_count(self, handle: str) -> dict[str, float]:
        if self.broken:
            raise self.AmdSmiException("no energy counter")
        watts = 700 if handle == "0000:C1:00.0" else 100
        return {"energy_accumulator": int(self.clock() * watts * 1e6 / 15.3), "counter_resolution": 15.3}

    def amdsmi_get_power_info(self, handle: str) -> dict[str, Any]:
        return self.power


def test_amd_counter_is_read_by_pci_address_and_checked_against_power() -> None:
    clock = Clock()
    smi = FakeSmi(clock)
    meter = GpuMeter(AmdBoards(smi, ["0000:c1:00.0", "0000:c1:00.0"]), clock=clock)
    for _ in range(700):
        clock.now_s += 0.1
        energy_j = meter.read().energy_j
    assert energy_j == pytest.approx(49_000, rel=1e-3)
    assert (meter.source, meter.idle_w) == ("amd_counter", 700)
    assert meter.audit().validity == "checked"
    smi.broken = True
    clock.now_s += 0.1
    with pytest.raises(EnergyMeterError, match=r"c1:00\.0.*no energy counter"):
        meter.read()
    meter.close()
    assert smi.sessions == 0


def test_amd_counter_that_counts_wrongly_is_found() -> None:
    clock = Clock()
    smi = FakeSmi(clock)
    smi.power = {"average_socket_power": 350, "current_socket_power": 0}
    meter = GpuMeter(AmdBoards(smi, ["0000:c1:00.0"]), clock=clock)
    for _ in range(700):
        clock.now_s += 0.1
        meter.read()
    assert meter.audit().validity == "invalid"
    meter.close()


def test_auto_knows_an_amd_gpu_by_its_address_and_names_one_that_is_missing() -> None:
    smi = FakeSmi(Clock())
    with pytest.raises(InputError, match=r"does not know GPU 0000:c9:00\.0; it knows 0000:c1"):
        choose_meter("auto", gpu_uuids=["0000:c9:00.0"], pids=[], power_model=MODEL, smi=smi)
    assert smi.sessions == 0
