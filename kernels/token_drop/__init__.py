"""Routed pairs dropped: to whole tiles of rows, or to a capacity."""

from moe.kernels.token_drop.op import ROUNDINGS, capacity_limit, token_rounding

__all__ = ["ROUNDINGS", "capacity_limit", "token_rounding"]
