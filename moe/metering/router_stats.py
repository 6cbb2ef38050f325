"""How evenly the router spreads tokens over experts. Shapes: L layers, E experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class RouterStats:
    """Balance of the experts over the layers that routed any token; None where none did.

    Attributes:
        load_max_over_mean: Busiest expert over mean expert, in the worst layer; 1 is perfect, E is collapse.
        mean_load_max_over_mean: The same ratio, averaged over the layers.
        entropy: Entropy of the load over log(E), averaged over the layers; 1 is perfect, 0 is collapse.
        num_dead_experts: Experts without a token, over all layers.
    """

    load_max_over_mean: float | None
    mean_load_max_over_mean: float | None
    entropy: float | None
    num_dead_experts: int


def router_stats(counts_LE: npt.ArrayLike) -> RouterStats:
    """Return the balance of tokens per layer and expert.

    Args:
        counts_LE: Tokens that each expert of each layer received, integers >= 0 of shape [L, E].

    Raises:
        ValueError: The shape is not [L, E], or a count is negative.
    """
    counts = np.asarray(counts_LE, dtype=np.int64)
    if counts.ndim != 2 or counts.shape[1] == 0:
        raise ValueError(f"counts have shape {counts.shape}; expected [num_layers, num_experts]")
    if (counts < 0).any():
        raise ValueError(f"counts must not be negative; the smallest is {counts.min()}")
    num_dead_experts = int((counts == 0).sum())
    used_LE = counts[counts.sum(axis=1) > 0]
    if used_LE.size == 0:
        return RouterStats(None, None, None, num_dead_experts)
    max_over_mean_L = used_LE.max(axis=1) / used_LE.mean(axis=1)
    return RouterStats(
        load_max_over_mean=float(max_over_mean_L.max()),
        mean_load_max_over_mean=float(max_over_mean_L.mean()),
        entropy=float(_relative_entropy(used_LE).mean()),
        num_dead_experts=num_dead_experts,
    )


def _relative_entropy(counts_LE: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the entropy of each row over that of an even row; a single expert is even by definition."""
    num_experts = counts_LE.shape[1]
    if num_experts == 1:
        return np.ones(counts_LE.shape[0])
    share_LE = counts_LE / counts_LE.sum(axis=1, keepdims=True)
    # 0 log 0 = 0: an idle expert adds nothing.
    log_share_LE = np.log(share_LE, out=np.zeros_like(share_LE), where=share_LE > 0)
    return np.asarray(-(share_LE * log_share_LE).sum(axis=1) / np.log(num_experts))
