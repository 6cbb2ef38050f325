"""Physics against what others measured on single kernels and on routing."""

from __future__ import annotations

import dataclasses

import pytest

from moe.planner.hardware import GPUS
from moe.planner.hardware_file import find_gpu
from moe.planner.ops import Op
from moe.planner.roofline import forward_time
from moe.planner.settings import load_plan_config, make_job
from moe.planner.step import step_time
from moe.planner.validate import published_config, published_rows

BF16 = 2


def gemm_share(M: int, N: int, K: int, groups: int = 1) -> float:
    """Share of the B200's peak that the roofline gives a GEMM of `groups` experts with M rows each."""
    flops = 2 * M * N * K * groups
    moved = BF16 * groups * (M * K + K * N + M * N)
    op = Op(name="gemm", kind="gemm", flops=flops, bytes=moved)
    return flops / forward_time(op, GPUS["b200"]).total_s / GPUS["b200"].peak_flops["bf16"]


# Measured on a B200 by SimuMax v1.2, configs/system/b200_bf16_ceperm.json.
@pytest.mark.parametrize(
    ("shape", "measured"),
    [
        ((128, 4096, 7168, 256), 0.208),
        ((256, 4096, 7168, 128), 0.271),
        ((512, 4096, 7168, 64), 0.367),
        ((1024, 4096, 7168, 32), 0.457),
        ((4096, 8192, 8192), 0.463),
        ((4096, 57344, 8192), 0.487),
        ((4096, 8192, 28672), 0.485),
        ((4096, 576, 5120), 0.322),
        ((4096, 5120, 576), 0.321),
        ((4096, 1536, 5120), 0.414),
    ],
    ids=str,
)
def test_roofline_is_near_measured_gemms(shape: tuple[int, ...], measured: float) -> None:
    assert gemm_share(*shape) == pytest.approx(measured, rel=0.13)


@pytest.mark.parametrize("number", ["11a", "11b"])
def test_natural_routing_costs_what_was_measured(number: str) -> None:
    """Qwen3-235B on 256 GPUs: 8 to 20 % less throughput than with forced balance."""
    row = next(row for row in published_rows() if row.id.startswith(number))
    config = load_plan_config(published_config(row.config), row.overrides)
    balanced = make_job(config, row.gpus, find_gpu(row.gpu))
    natural = dataclasses.replace(balanced, plan=balanced.plan.model_copy(update={"routing": "natural"}))
    loss = 1 - step_time(balanced).step_s / step_time(natural).step_s
    assert 0.08 <= loss <= 0.21
