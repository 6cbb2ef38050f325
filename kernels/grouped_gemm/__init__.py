"""Each expert's rows times its own weight."""

from moe.kernels.grouped_gemm.op import grouped_gemm

__all__ = ["grouped_gemm"]
