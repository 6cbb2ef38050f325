"""How long a kernel takes.

A kernel takes the time of its arithmetic plus that of its memory traffic. The sum, not the larger of the two:
it gives within 13 % what was measured on a B200 for GEMMs from 0.2 to 0.5 of peak, narrow ones and grouped
ones with few rows for each expert (SimuMax v1.2), whose loads are not hidden. A test has the shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.planner.hardware import Gpu
from moe.planner.ops import Op

# Attention with 8-bit operands over that with 16: the products are twice as fast, the exponentials are not.
FP8_ATTENTION = 1.25
# An exponential costs as much as products over so long a head, which narrow heads feel: FlashAttention-3
# (arXiv 2407.08608) has on H100 about 0.75 of its speed with heads of 64 that it has with those of 128.
EXPONENTIAL = 64
WHOLE_HEAD = 128


@dataclass(frozen=True)
class KernelTime:
    """Seconds of one micro-batch.

    Attributes:
        math_s: In tensor cores.
        memory_s: Streaming.
        launches: Kernels.
    """

    math_s: float
    memory_s: float
    launches: int

    @property
    def total_s(self) -> float:
        """On the GPU."""
        return self.math_s + self.memory_s


def forward_time(op: Op, gpu: Gpu) -> KernelTime:
    """Time of the forward pass of an op."""
    rate = _rate(op, gpu, backward=False)
    memory_s = op.bytes / (gpu.hbm_bytes_per_s * gpu.efficiency.hbm) + op.launches * gpu.kernel_s
    return KernelTime(op.flops / rate, memory_s, op.launches)


def backward_time(op: Op, gpu: Gpu) -> KernelTime:
    """Time of the backward pass of an op."""
    rate = _rate(op, gpu, backward=True)
    hbm = gpu.hbm_bytes_per_s * gpu.efficiency.hbm
    memory_s = op.backward_bytes / hbm + op.backward_launches * gpu.kernel_s
    return KernelTime(op.backward_flops / rate, memory_s, op.backward_launches)


def _rate(op: Op, gpu: Gpu, *, backward: bool) -> float:
    """Sustained FLOP/s."""
    efficiency, peak = gpu.efficiency, gpu.peak_flops
    if op.kind == "attention":
        share = efficiency.attention_bwd if backward else efficiency.attention_fwd
        head = op.head_dim
        narrow = min(1.0, head / (head + EXPONENTIAL) * (WHOLE_HEAD + EXPONENTIAL) / WHOLE_HEAD)
        return peak["bf16"] * share * narrow * (FP8_ATTENTION if op.precision == "fp8" else 1.0)
    share = efficiency.gemm_fp8 if op.precision in ("fp8", "mxfp8") else efficiency.gemm_bf16
    return peak[op.precision] * share
