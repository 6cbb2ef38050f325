"""Which samples a rank reads at a step: the same global batch in every parallel layout."""

from __future__ import annotations


def num_microbatches(*, global_batch_size: int, micro_batch_size: int, dp_size: int) -> int:
    """Micro-batches that each data-parallel rank runs in a step.

    Raises:
        ValueError: The global batch does not divide evenly.
    """
    samples_at_once = micro_batch_size * dp_size
    if global_batch_size % samples_at_once:
        raise ValueError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
            f"x data-parallel size {dp_size}"
        )
    return global_batch_size // samples_at_once


def microbatch_indices(
    step: int,
    microbatch: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> range:
    """Sample indices of one micro-batch of one rank.

    Step `step` takes samples `step * global_batch_size` up to the next step's first one, whatever the layout;
    within it the ranks take turns, `micro_batch_size` samples each. Nothing is kept between calls, so the
    position in the data is the step number alone.

    Args:
        step: Counted from 0.
        microbatch: Counted from 0 within the step.
        global_batch_size: Samples of a step over all ranks.
        micro_batch_size: Samples of one forward pass of one rank.
        dp_rank: Rank within the data-parallel group.
        dp_size: Size of the data-parallel group.

    Raises:
        ValueError: The global batch does not divide evenly, or an index is out of its range.
    """
    count = num_microbatches(
        global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, dp_size=dp_size
    )
    if step < 0 or not 0 <= microbatch < count or not 0 <= dp_rank < dp_size:
        raise ValueError(
            f"step {step}, microbatch {microbatch} of {count}, dp_rank {dp_rank} of {dp_size}: out of range"
        )
    first = step * global_batch_size + (microbatch * dp_size + dp_rank) * micro_batch_size
    return range(first, first + micro_batch_size)
