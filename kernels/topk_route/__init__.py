"""Router logits to expert ids, combine weights and per-expert counts."""

from moe.kernels.topk_route.op import topk_route

__all__ = ["topk_route"]
