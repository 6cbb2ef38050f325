"""Fused attention: exponentials, windows, 8-bit operands and rotations, by hand and as cuDNN was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe.planner.hardware_file import find_gpu
from moe.planner.op import Op
from moe.planner.ops import layer_ops
from moe.planner.roofline import backward_time, forward_time
from moe.planner.settings import Job, load_plan_config, make_job

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES = ("parallel.pp=1", "parallel.vpp=1", "parallel.stage_layers=[]")
TE = ("plan.kernels=te", "plan.routing=balanced")


def job_of(recipe: str, *overrides: str, gpu: str = "gb200") -> Job:
    config = load_plan_config(CONFIGS / f"{recipe}.yaml", (*STAGES, *TE, *overrides))
    return make_job(config, 64, find_gpu(gpu))


def op_of(job: Job, name: str = "attention") -> Op:
    (op,) = (op for op in layer_ops(job, dense=False) if op.name == name)
    return op


def speed(gpu: str, head_dim: float, precision: str = "bf16") -> float:
    """FLOP/s of attention's arithmetic."""
    op = Op(name="", kind="attention", flops=1e15, head_dim=head_dim, precision=precision)
    return op.flops / forward_time(op, find_gpu(gpu)).math_s


@pytest.mark.parametrize(
    ("gpu", "flops", "exps"), [("h100", 4096, 16), ("b200", 8192, 16), ("b300", 8192, 32)]
)
def test_softmax_takes_what_its_units_take(gpu: str, flops: int, exps: int) -> None:
    """Clocks of a score on an SM: 4 d FLOPs, one exponential, three operations in 128 lanes."""

    def clocks(head_dim: int, flops: int) -> float:
        return 4 * head_dim / flops + 1 / exps + 3 / 128

    narrow = 2 * clocks(64, flops) / clocks(128, flops)
    assert speed(gpu, 128) / speed(gpu, 64) == pytest.approx(narrow)
    in_8_bits = clocks(128, flops) / clocks(128, 2 * flops)
    assert speed(gpu, 128, "fp8") / speed(gpu, 128) == pytest.approx(in_8_bits)
    assert 1 < in_8_bits < 2
    for precision in ("bf16", "fp8"):
        assert speed(gpu, 256, precision) == speed(gpu, 128, precision)


def test_twice_the_exponentials_help_narrow_heads_most() -> None:
    b200, b300 = find_gpu("b200"), find_gpu("b300")
    assert b300.sm_exps == 2 * b200.sm_exps
    gains = [speed("b300", d) / speed("b200", d) for d in (32, 64, 128)]
    assert gains[0] > gains[1] > gains[2] > 1


# Milliseconds: NVIDIA cudnn-frontend 1.23, sdpa_benchmark_training/results/gpt_oss: a window of 128, 2
# sequences of 4096, 128 heads of 64, each with keys of its own; forward, and backward in BF16.
@pytest.mark.parametrize(
    ("gpu", "forward_ms", "backward_ms"), [("gb200", 0.210, 0.465), ("gb300", 0.202, 0.442)]
)
def test_windows_take_what_was_measured(gpu: str, forward_ms: float, backward_ms: float) -> None:
    heads = ("model.attention.num_query_groups=64", "model.attention.full_attention_every=0")
    job = job_of("gpt-oss-120b", *heads, "train.micro_batch_size=4", gpu=gpu)
    op = op_of(job)
    assert 1e3 * forward_time(op, job.gpu).total_s == pytest.approx(forward_ms, rel=0.15)
    assert 1e3 * backward_time(op, job.gpu).total_s == pytest.approx(backward_ms, rel=0.15)
    # Of its products alone, without tiles and memory, it would take a fifth.
    assert op.flops / (2.5e15 * 0.5) < 0.3e-3 * forward_ms


def window_job(*overrides: str, **changes: Any) -> Job:
    job = job_of("gpt-oss-120b", "model.attention.full_attention_every=0", *overrides)
    return replace(job, **changes)


def test_a_windowed_layer_computes_whole_tiles() -> None:
    job = window_job()
    seen = 128 + 128 - 256**2 / (2 * 4096)
    products = job.tokens * seen * 64 * (64 + 64)
    assert op_of(job).flops == pytest.approx(2 * products, rel=1e-6)
    assert op_of(job).backward_flops == pytest.approx(5 * products, rel=1e-6)


def test_windows_do_not_help_the_backward_pass_in_8_bits() -> None:
    narrow, wide = (window_job(f"plan.fp8_attention={flag}") for flag in ("true", "false"))
    whole = job_of(
        "gpt-oss-120b", "model.attention.sliding_window=0", "model.attention.full_attention_every=0"
    )
    assert op_of(narrow).backward_flops == op_of(whole).backward_flops > 5 * op_of(wide).backward_flops
    assert op_of(narrow).flops == op_of(wide).flops


def test_attention_streams_its_operands() -> None:
    """Forward reads three and writes one; backward reads these and a gradient, and writes three."""
    job = job_of("qwen3-30b-a3b", "plan.precision=bf16")
    q, kv = job.tokens * 32 * 128, job.tokens * 2 * 4 * 128
    assert op_of(job).bytes == 2 * (2 * q + kv)
    assert op_of(job).backward_bytes == 2 * (4 * q + 2 * kv)
    eight = op_of(job_of("qwen3-30b-a3b", "plan.precision=bf16", "plan.fp8_attention=true"))
    assert eight.bytes == 4 * (q + kv) + 2 * q
    assert eight.backward_bytes == 3 * (q + kv) + (2 + 4) * q


def test_a_scaled_rotation_is_not_fused_in_megatron_core() -> None:
    scaled = job_of("gpt-oss-120b")
    plain = job_of("gpt-oss-120b", "model.attention.yarn.rotation_scale=1")
    ours = [
        job_of("gpt-oss-120b", "plan.kernels=ours", f"model.attention.yarn.rotation_scale={s}")
        for s in (1, 2)
    ]
    name, numbers = "rotate and norm heads", scaled.tokens * (64 + 8) * 64
    extra = [getattr(op_of(scaled, name), field) - getattr(op_of(plain, name), field) for field in ROTATION]
    assert extra == [20 * numbers, 22 * numbers, 10, 14]
    assert op_of(ours[0], name) == op_of(ours[1], name)
    latent = job_of("deepseek-v3-671b")
    assert not latent.shape.attention.rotation_scaled or op_of(latent, name).launches == 4


ROTATION = ("bytes", "backward_bytes", "launches", "backward_launches")
