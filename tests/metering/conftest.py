"""A finished run's report, any field of which a test can change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moe.metering.report import Energy, Layout, Report


@pytest.fixture
def make_report() -> Callable[..., Report]:
    def make(*, energy: dict[str, Any] | None = None, **changes: Any) -> Report:
        default_energy: dict[str, Any] = {
            "source": "estimated",
            "boundary": "node",
            "description": "about the meter",
            "total_j": 100.0,
            "idle_w": 1.5,
        }
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
            "energy": Energy(**default_energy | (energy or {})),
            "tokens_per_j": 40.96,
        }
        return Report(**fields | changes)

    return make
