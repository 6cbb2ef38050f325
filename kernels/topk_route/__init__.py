"""Router logits to expert ids, combine weights and per-expert counts, and the sums of router losses."""

from moe.kernels.topk_route.op import SCORES, RouteSums, topk_route, topk_route_with_sums

__all__ = ["SCORES", "RouteSums", "topk_route", "topk_route_with_sums"]
