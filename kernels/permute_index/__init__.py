"""Expert ids to the permutation into expert order, and that order padded to whole tiles."""

from moe.kernels.permute_index.op import pad_to_tiles, permute_index

__all__ = ["pad_to_tiles", "permute_index"]
