"""Routed pairs dropped so that experts get whole tiles of rows."""

from moe.kernels.token_rounding.op import token_rounding

__all__ = ["token_rounding"]
