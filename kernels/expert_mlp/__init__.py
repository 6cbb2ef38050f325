"""Grouped SwiGLU feed-forward of the experts."""

from moe.kernels.expert_mlp.op import expert_mlp

__all__ = ["expert_mlp"]
