"""The layer's joules on a replayed meter: turns, ratio, and the verdict on the meter itself."""

from __future__ import annotations

import json

import pytest

from benchmarks.bench_layer_joules import measure
from benchmarks.shapes import Shape
from moe.metering.energy import Audit, EnergyReading

SHAPE = Shape(1000, 64, 32, 8, 2)


class CountedMeter:
    """Joules that the work itself says it took."""

    boundary, description, idle_w, devices = "gpu", "counted", 90.0, ("GPU-a",)

    def __init__(self, audit: Audit, source: str = "rapl") -> None:
        self.source = source
        self.energy_j = 0.0
        self._audit = audit

    def read(self) -> EnergyReading:
        return EnergyReading(0.0, self.energy_j, (self.energy_j,))

    def audit(self) -> Audit:
        return self._audit

    def close(self) -> None:
        pass


def turns_of(meter: CountedMeter) -> tuple[dict, list[str]]:
    """What measure() says of bf16 at 2 J a call and FP8 at 1.6, and who ran when."""
    order: list[str] = []

    def work(name: str, joules: float):
        def call() -> None:
            if not order or order[-1] != name:
                order.append(name)
            meter.energy_j += joules

        return call

    calls = {"bf16": work("bf16", 2.0), "fp8": work("fp8", 1.6)}
    return measure(meter, calls, SHAPE, pairs=3, seconds=0.01, device="cpu"), order


def test_turns_and_ratio_of_fp8_over_bf16():
    result, order = turns_of(CountedMeter(Audit("checked", "they agree", 100.0, 101.0, 63.0)))
    # Once to warm up, then three pairs, the numerator first: a drift would else count double, not cancel.
    assert order == ["fp8", "bf16"] * 4
    assert result["tokens_per_j"]["bf16"] == pytest.approx([500.0] * 3)
    assert result["fp8_over_bf16"]["ratio"]["mean"] == pytest.approx(1.25)
    assert result["fp8_over_bf16"]["verdict"] == "better"
    assert (result["audit"]["validity"], result["audit"]["window_s"]) == ("checked", 63.0)
    json.dumps(result)


def test_what_the_meter_cannot_tell_has_no_verdict():
    disagreeing, _ = turns_of(CountedMeter(Audit("invalid", "they differ")))
    assert disagreeing["fp8_over_bf16"]["verdict"] == "inconclusive"
    # An NVML counter is good to 0.2 s of power: windows of 10 ms resolve nothing.
    coarse, _ = turns_of(CountedMeter(Audit("checked", "they agree"), "nvml_counter"))
    assert coarse["fp8_over_bf16"]["resolution"] == pytest.approx(20)
    assert coarse["fp8_over_bf16"]["verdict"] == "inconclusive"


def test_without_fp8_there_is_no_ratio():
    meter = CountedMeter(Audit("invalid", "they differ"))

    def call() -> None:
        meter.energy_j += 1.0

    result = measure(meter, {"bf16": call}, SHAPE, pairs=3, seconds=0.01, device="cpu")
    assert result["fp8_over_bf16"] is None
    assert result["audit"]["validity"] == "invalid"
