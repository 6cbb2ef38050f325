"""Learning rate and batch over the steps of a run: functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math

from moe.config.schema import OptimSection, TrainSection


def learning_rate(step: int, optim: OptimSection, total_steps: int) -> float:
    """Linear warm-up to lr, then as optim.schedule says; a decay is a cosine to min_lr (arXiv 1608.03983).

    Args:
        step: from 0; the first step already has 1 / warmup_steps of lr.
        optim: lr, min_lr, schedule and the steps where its parts end.
        total_steps: end of the decay where decay_steps is 0.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    begin = optim.stable_steps if optim.schedule == "wsd" else optim.warmup_steps
    if optim.schedule == "constant" or step < begin:
        return optim.lr
    end = optim.decay_steps or total_steps
    progress = min(1.0, (step - begin) / max(1, end - begin))
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def global_batch(step: int, train: TrainSection) -> range:
    """Samples of a step, counted from the first of the run.

    Args:
        step: from 0.
        train: batch_schedule, and global_batch_size for the steps after it.
    """
    first = 0
    for stage in train.batch_schedule:
        if step < stage.steps:
            start = first + step * stage.global_batch_size
            return range(start, start + stage.global_batch_size)
        first += stage.steps * stage.global_batch_size
        step -= stage.steps
    start = first + step * train.global_batch_size
    return range(start, start + train.global_batch_size)
