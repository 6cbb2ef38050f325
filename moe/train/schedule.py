"""Learning rate over the steps of a run."""

from __future__ import annotations

import math

from moe.config.schema import OptimSection


def learning_rate(step: int, optim: OptimSection, total_steps: int) -> float:
    """Linear warm-up to lr, then a cosine down to min_lr (arXiv 1608.03983).

    Args:
        step: from 0; the first step already has 1 / warmup_steps of lr.
        optim: lr, min_lr, warmup_steps, decay_steps.
        total_steps: end of the decay where decay_steps is 0.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    end = optim.decay_steps or total_steps
    progress = min(1.0, (step - optim.warmup_steps) / max(1, end - optim.warmup_steps))
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
