"""Recorded traces, replayed: each fault that a recording can hold ends in its documented outcome."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe.errors import InputError
from moe.metering.device_trace import CounterTrace
from moe.metering.energy import EnergyMeterError
from moe.metering.trace_file import ReplayMeter

Sample = dict[str, dict[str, float | None]]
HEADER = {"devices": ["GPU-a", "GPU-b"], "source": "nvml_counter", "power_boundary": "gpu"}


def steady(tenth: int) -> Sample:
    """Two GPUs of 600 and 400 W, whose counters move every 100 ms."""
    return {
        "GPU-a": {"energy_j": 1e6 + 60.0 * tenth, "power_w": 600.0},
        "GPU-b": {"energy_j": 2e6 + 40.0 * tenth, "power_w": 400.0},
    }


def write(
    path: Path, sample: Callable[[int], Sample | None], *, seconds: int = 80, **header: Any
) -> ReplayMeter:
    lines: list[dict[str, Any]] = [HEADER | header]
    for tenth in range(10 * seconds + 1):
        if (devices := sample(tenth)) is not None:
            lines.append({"time_s": tenth / 10, "devices": devices})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ReplayMeter(path)


def test_steady_run_is_counted_and_checked(tmp_path: Path) -> None:
    meter = write(tmp_path / "trace.jsonl", steady)
    assert meter.read().device_j == pytest.approx((600 * 80, 400 * 80), rel=2e-3)
    audit = meter.audit()
    assert audit.validity == "checked"
    assert (audit.counter_j, audit.trace_j) == pytest.approx((80_000, 80_000))


def test_window_between_two_moments_is_interpolated(tmp_path: Path) -> None:
    write(tmp_path / "trace.jsonl", steady)
    now_s = [20.03]
    meter = ReplayMeter(tmp_path / "trace.jsonl", clock=lambda: now_s[0])
    before_j = meter.read().energy_j
    now_s[0] = 50.08
    # As read, the counters would give a multiple of 100 J.
    assert meter.read().energy_j - before_j == pytest.approx(1000 * 30.05, abs=1)


@pytest.mark.parametrize("fall_j", [1e6, 1e6 + 3000 - 1], ids=["driver reload", "wrap"])
def test_counter_that_falls_ends_the_replay_there(fall_j: float, tmp_path: Path) -> None:
    def falls(tenth: int) -> Sample:
        devices = steady(tenth)
        if tenth >= 500:
            devices["GPU-a"]["energy_j"] -= fall_j  # type: ignore[operator]
        return devices

    meter = write(tmp_path / "trace.jsonl", falls)
    with pytest.raises(EnergyMeterError, match="GPU-a: the energy counter went back"):
        meter.read()
    assert meter.audit().validity == "invalid"
    early = ReplayMeter(tmp_path / "trace.jsonl", clock=lambda: 49.9)
    assert early.read().energy_j == pytest.approx(49_900, rel=2e-3)


def test_samples_missing_altogether_leave_the_counter_whole(tmp_path: Path) -> None:
    meter = write(tmp_path / "trace.jsonl", lambda tenth: None if 300 < tenth < 480 else steady(tenth))
    assert meter.read().energy_j == pytest.approx(80_000, rel=2e-3)
    audit = meter.audit()
    assert (audit.validity, "not sampled for 18.0 s" in audit.detail) == ("unchecked", True)


def test_power_alone_with_missing_samples_is_invalid(tmp_path: Path) -> None:
    def power_only(tenth: int) -> Sample | None:
        if 300 < tenth < 480:
            return None
        return {name: {"power_w": values["power_w"]} for name, values in steady(tenth).items()}

    meter = write(tmp_path / "trace.jsonl", power_only, source="nvml_power")
    audit = meter.audit()
    assert (audit.validity, "not sampled for 18.0 of 80.0 s" in audit.detail) == ("invalid", True)


def test_module_power_is_labelled_so(tmp_path: Path) -> None:
    def module(tenth: int) -> Sample:
        return {name: {"power_w": 900.0} for name in steady(tenth)}

    meter = write(tmp_path / "trace.jsonl", module, source="nvml_power", power_boundary="module")
    assert meter.boundary == "module"
    assert meter.read().energy_j == pytest.approx(2 * 900 * 80)


def test_counter_that_stops_ends_the_replay(tmp_path: Path) -> None:
    meter = write(tmp_path / "trace.jsonl", lambda tenth: steady(min(tenth, 300)))
    with pytest.raises(EnergyMeterError, match="so it is not counting"):
        meter.read()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "no trace of a meter"),
        (json.dumps(HEADER) + "\n", "no trace of a meter"),
        ("{}\n", "no trace of a meter"),
        (json.dumps(HEADER) + '\n{"time_s": 1\n', "line 2 is not JSON"),
        (json.dumps(HEADER) + '\n{"time_s": 1, "devices": {"GPU-a": {"power_w": 1}}}\n', "GPU-b"),
    ],
    ids=["missing", "empty", "no sample", "no header", "broken line", "missing device"],
)
def test_file_that_is_no_trace_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        ReplayMeter(path)


def test_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write(path, steady)
    path.write_text(path.read_text() + '{"time_s": 80.1, "dev')
    assert ReplayMeter(path).read().time_s == 80


def test_jump_is_dated_between_the_samples_that_saw_it() -> None:
    trace = CounterTrace("GPU-a", 0.0, 1000.0)
    trace.add(0.06, 1050.0)
    assert trace.energy_at(0.06, power_w=500) == pytest.approx(50 + 500 * 0.03)
    trace.add(0.12, 1050.0)
    trace.add(0.18, 1100.0)
    assert trace.energy_at(0.15, power_w=500) == pytest.approx(100)
    # Readings never fall, also where the power before a jump was more than the counter then shows.
    assert trace.energy_at(0.10, power_w=500) == pytest.approx(100)
