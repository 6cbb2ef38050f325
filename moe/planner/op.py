"""What a kernel costs, and a GEMM in 8 bits of which one product is wide."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moe.planner.activations import EIGHT_BITS
from moe.planner.settings import Job


@dataclass(frozen=True, kw_only=True)
class Op:
    """One kernel or a few alike.

    Attributes:
        name: What it computes.
        kind: What limits it: gemm, attention (fused), or memory.
        part: What recomputation names.
        flops: Forward.
        bytes: Forward, read and written.
        head_dim: Mean size of the query-key and the value heads of attention.
        backward_flops: Backward.
        backward_bytes: Backward.
        launches: Kernels forward.
        backward_launches: Kernels backward.
        of_experts: Grows with the load of the busiest rank.
        precision: Of the operands of products, a key of Gpu.peak_flops.
    """

    name: str
    kind: Literal["gemm", "attention", "memory"]
    part: str = ""
    flops: float = 0.0
    bytes: float = 0.0
    head_dim: float = 0.0
    backward_flops: float = 0.0
    backward_bytes: float = 0.0
    launches: int = 1
    backward_launches: int = 2
    of_experts: bool = False
    precision: str = "bf16"


def with_one_wide(job: Job, ops: list[Op], operands: tuple[float, float], *, backward: bool) -> list[Op]:
    """The ops of a GEMM, the forward product or that of the input's gradient with operands that stay wide.

    Rows are then quantised for the weight's gradient only, along one dimension in place of two, and the
    weight for the other product of the two that read it.

    Args:
        job: For the precision.
        ops: The GEMM and the quantisation of its rows and of its weight; alone, it is wide already.
        operands: Numbers of the rows and of the weight.
        backward: Whether it is the input's gradient.
    """
    gemm, *quantised = ops
    if not quantised:
        return ops
    rows, weight = operands
    more_bytes = (job.wide_bytes - 1) * (rows + weight)  # the GEMM counts a byte for each of these numbers
    wide = Op(
        name=f"{gemm.name}, wide",
        kind="gemm",
        part=gemm.part,
        launches=0,
        backward_launches=0,
        of_experts=gemm.of_experts,
        precision="bf16" if job.precision in EIGHT_BITS else job.precision,
    )
    of_rows, *of_weight = quantised
    if backward:
        as_forward = gemm.flops  # the same rows, the same weight
        return [
            replace(gemm, backward_flops=gemm.backward_flops - as_forward),
            replace(wide, backward_flops=as_forward, backward_bytes=more_bytes),
            replace(of_rows, backward_bytes=of_rows.backward_bytes - rows),
            *(replace(op, backward_bytes=0.0, backward_launches=0) for op in of_weight),
        ]
    return [
        replace(gemm, flops=0.0),
        replace(wide, flops=gemm.flops, bytes=more_bytes),
        replace(of_rows, bytes=of_rows.bytes - rows),
        *(replace(op, bytes=0.0, launches=0) for op in of_weight),
    ]
