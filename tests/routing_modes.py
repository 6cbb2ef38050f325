"""The ways to score and weight experts that routing's tests run through."""

from __future__ import annotations

from typing import Any

PLAIN: dict[str, Any] = {
    "score": "softmax",
    "score_before_topk": True,
    "renormalize": False,
    "scale": 1.0,
}
MODES = {
    "softmax": PLAIN,
    "softmax_renormalized": PLAIN | {"renormalize": True},
    "softmax_after_topk": PLAIN | {"score_before_topk": False, "scale": 0.5},
    "sigmoid": PLAIN | {"score": "sigmoid"},
    "sigmoid_renormalized": PLAIN | {"score": "sigmoid", "renormalize": True, "scale": 2.5},
}


def weights_are_constant(num_experts: int, top_k: int, mode: dict[str, Any]) -> bool:
    """A share of the whole, where the whole is one number: its gradient is zero but for rounding."""
    of_the_chosen = mode["renormalize"] or not mode["score_before_topk"]
    return (num_experts == 1 and mode["score"] == "softmax") or (top_k == 1 and of_the_chosen)
