"""Expert ids to the permutation into expert order."""

from moe.kernels.permute_index.op import permute_index

__all__ = ["permute_index"]
