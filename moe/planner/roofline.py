"""How long a kernel takes.

A kernel takes the time of its arithmetic plus that of its memory traffic. The sum, not the larger of the two:
it gives within 13 % what was measured on a B200 for GEMMs from 0.2 to 0.5 of peak, narrow ones and grouped
ones with few rows for each expert (SimuMax v1.2), whose loads are not hidden. A test has the shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.planner.hardware import Gpu
from moe.planner.op import Op

# Heads that efficiencies of attention stand for; with wider ones cuDNN is not faster (its benchmarks, see
# attention.py).
WHOLE_HEAD = 128
# A score takes 4 FLOPs for each number of a head forward, in tensor cores; an exponential in the special
# function units; and the largest of a row, a scaled difference and a sum in the 128 fp32 lanes of an SM
# (FlashAttention-2, arXiv 2307.08691, algorithm 1). Heads of 64 so have 0.71 of the speed of heads of 128 on
# H100 and 0.63 on B200, where cuDNN has 0.66-0.72 and 0.47-0.52; 8-bit operands, whose products alone are
# twice as fast, 1.27 times the speed on B200 and 1.36 on B300, where it has 1.26-1.28 and 1.39-1.60.
SCORE_FLOPS = 4
SCORE_LANE_OPS = 3
LANES = 128


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
        return peak["bf16"] * share * _head_factor(op, gpu)
    share = efficiency.gemm_fp8 if op.precision in ("fp8", "mxfp8") else efficiency.gemm_bf16
    return peak[op.precision] * share


def _head_factor(op: Op, gpu: Gpu) -> float:
    """Speed of attention over that with 16-bit operands and whole heads: of softmax nothing gets narrower."""
    softmax = gpu.sm_flops * (1 / gpu.sm_exps + SCORE_LANE_OPS / LANES)
    products, whole = SCORE_FLOPS * min(op.head_dim, WHOLE_HEAD), SCORE_FLOPS * WHOLE_HEAD
    narrow = products / (products + softmax) * (whole + softmax) / whole
    in_8_bits = (products + softmax) / (products / 2 + softmax) if op.precision == "fp8" else 1.0
    return narrow * in_8_bits
