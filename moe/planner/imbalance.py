"""How unevenly experts are loaded."""

from __future__ import annotations

import math

from moe.planner.settings import Job

# Spread of the expert loads that training on text leaves, relative to their mean: the one value that gives
# the 8-20 % which Qwen3-235B on 256 GPUs loses against forced balance (Megatron's ModelZoo).
NATURAL_SPREAD = 0.3


def imbalance(job: Job) -> float:
    """Load of the busiest expert rank over the mean.

    A rank holds E / ep experts, whose loads spread independently; the largest of n normal values lies about
    sqrt(2 ln n) deviations above the mean. Balanced routing leaves the chance of drawing tokens; a capacity
    cuts what is above it.
    """
    ep = job.layout.ep
    if ep == 1:
        return 1.0
    experts = job.shape.num_experts / ep
    rows = job.tokens / job.layout.tp * job.shape.top_k  # what each expert rank gets on average
    spread = NATURAL_SPREAD if job.plan.routing == "natural" else 0.0
    deviation = math.sqrt(spread**2 / experts + 1 / rows)
    busiest = 1 + deviation * math.sqrt(2 * math.log(ep))
    return min(busiest, job.shape.capacity_factor) if job.shape.capacity_factor >= 1 else busiest
