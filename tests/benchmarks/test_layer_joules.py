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

    source, boundary, description, idle_w, devices = "nvml_counter", "gpu", "counted", 90.0, ("GPU-a",)

    def __init__(self, audit: Audit) -> None:
        self.energy_j = 0.0
        self._audit = audit

    def read(self) -> EnergyReading:
        return EnergyReading(0.0, self.energy_j, (self.energy_j,))

    def audit(self) -> Audit:
        return self._audit

    def close(self) -> None:
        pass


def test_turns_and_ratio_of_fp8_over_bf16():
    meter = CountedMeter(Audit("checked", "they agree", 100.0, 101.0, 63.0))
    order: list[str] = []

    def work(name: str, joules: float):
        def call() -> None:
            if not order or order[-1] != name:
                order.append(name)
            meter.energy_j += joules

        return call

    calls = {"bf16": work("bf16", 2.0), "fp8": work("fp8", 1.6)}
    result = measure(meter, calls, SHAPE, pairs=3, seconds=0.01, device="cpu")
    assert order == ["bf16", "fp8"] * 4  # once to warm up, then three pairs
    assert result["tokens_per_j"]["bf16"] == pytest.approx([500.0] * 3)
    assert result["fp8_over_bf16"]["ratio"]["mean"] == pytest.approx(1.25)
    assert result["fp8_over_bf16"]["verdict"] == "better"
    assert (result["audit"]["validity"], result["audit"]["window_s"]) == ("checked", 63.0)
    json.dumps(result)


def test_without_fp8_there_is_no_ratio():
    meter = CountedMeter(Audit("invalid", "they differ"))

    def call() -> None:
        meter.energy_j += 1.0

    result = measure(meter, {"bf16": call}, SHAPE, pairs=3, seconds=0.01, device="cpu")
    assert result["fp8_over_bf16"] is None
    assert result["audit"]["validity"] == "invalid"
