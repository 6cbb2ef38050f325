"""Tokens into expert order (permute) and expert outputs back to tokens (combine)."""

from moe.kernels.combine.op import combine, permute

__all__ = ["combine", "permute"]
