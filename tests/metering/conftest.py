"""A finished run's report, any field of which a test can change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moe.metering.boundaries import Level, Surroundings, stack_levels
from moe.metering.report import Campaign, Energy, Layout, Report

AROUND = Surroundings(
    num_gpus=2,
    num_machines=2,
    wall_s=10.0,
    host_w_per_gpu=500.0,
    fabric_w_per_gpu=250.0,
    pue=1.2,
    pue_source="this test",
)


@pytest.fixture
def make_energy() -> Callable[..., Energy]:
    def make(**changes: Any) -> Energy:
        fields: dict[str, Any] = {
            "source": "estimated",
            "boundary": "node",
            "description": "about the meter",
            "total_j": 100.0,
            "idle_w": 1.5,
            "validity": "unchecked",
            "validity_detail": "nothing was measured",
            "cross_check": None,
            "spread": None,
        } | changes
        if "levels" not in fields:
            basis = "estimated" if fields["source"] == "estimated" else "measured"
            inner = Level(
                boundary=fields["boundary"], basis=basis, source="a meter", energy_j=fields["total_j"]
            )
            fields["levels"] = stack_levels(inner, AROUND)
        return Energy(**fields)

    return make


@pytest.fixture
def make_report(make_energy: Callable[..., Energy]) -> Callable[..., Report]:
    def make(*, energy: dict[str, Any] | None = None, **changes: Any) -> Report:
        fields: dict[str, Any] = {
            "run": "demo",
            "commit": None,
            "steps": 4,
            "tokens": 4096,
            "params_total": 10,
            "params_active": 5,
            "flops_per_token": 30,
            "loss_first": 8.0,
            "loss_last": 7.0,
            "heldout_loss": 7.1,
            "heldout_bits_per_byte": 2.5,
            "tokens_per_s": 409.6,
            "wall_s": 10.0,
            "layout": Layout(tp=1, pp=1, ep=2, cp=1, dp=2),
            "engine": "megatron",
            "device": "cpu",
            "energy": make_energy(**(energy or {})),
            "tokens_per_j": 40.96,
            "campaign": Campaign(starts=3, campaign_j=100.0, useful_j=80.0, goodput=0.8),
        }
        return Report(**fields | changes)

    return make
