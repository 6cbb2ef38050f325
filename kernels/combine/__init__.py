"""Tokens into expert order (permute) and expert outputs back to tokens (combine)."""

from moe.kernels.combine.op import combine, permute, unpermute

__all__ = ["combine", "permute", "unpermute"]
