"""When each pipeline stage works on which micro-batch: 1F1B and its interleaved form (arXiv 2104.04473).

Played out event by event; step.py has the closed form, which a test compares with this. Here for the picture.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from moe.planner.layout import Layout


@dataclass(frozen=True)
class Pass:
    """One stage's work on one micro-batch in one chunk of layers."""

    stage: int
    microbatch: int
    chunk: int
    is_backward: bool


@dataclass(frozen=True)
class Span:
    """A pass and when it runs."""

    work: Pass
    start_s: float
    end_s: float


def timeline(
    layout: Layout, num_microbatches: int, forward_s: Sequence[float], backward_s: Sequence[float]
) -> list[Span]:
    """Play out a step.

    Args:
        layout: For pp and vpp.
        num_microbatches: Of the step; with chunks a multiple of pp, as Megatron-Core demands.
        forward_s: Of a whole micro-batch, for each stage.
        backward_s: Likewise.

    Returns:
        Every pass, in the order in which each stage runs them.
    """
    waiting = [deque(_order(stage, layout, num_microbatches)) for stage in range(layout.pp)]
    done: dict[Pass, float] = {}
    free = [0.0] * layout.pp
    spans = []
    while any(waiting):
        for stage, passes in enumerate(waiting):
            while passes and (ready := _ready_s(passes[0], layout, done)) is not None:
                work = passes.popleft()
                whole_s = (backward_s if work.is_backward else forward_s)[stage]
                start = max(free[stage], ready)
                free[stage] = done[work] = start + whole_s / layout.vpp
                spans.append(Span(work, start, free[stage]))
    return spans


def _order(stage: int, layout: Layout, num_microbatches: int) -> list[Pass]:
    """The passes of a stage: warm-up forwards, then one forward and one backward in turn, then the rest."""
    pp, vpp = layout.pp, layout.vpp
    total = num_microbatches * vpp
    after = pp - stage - 1
    warm = min(total, after if vpp == 1 else 2 * after + (vpp - 1) * pp)
    forward = [_pass(stage, k, layout, is_backward=False) for k in range(total)]
    backward = [_pass(stage, k, layout, is_backward=True) for k in range(total)]
    steady = [work for pair in zip(forward[warm:], backward, strict=False) for work in pair]
    return [*forward[:warm], *steady, *backward[total - warm :]]


def _pass(stage: int, k: int, layout: Layout, *, is_backward: bool) -> Pass:
    """The k-th pass of a kind: chunks take turns, pp micro-batches each; backwards from the last chunk."""
    pp, vpp = layout.pp, layout.vpp
    if vpp == 1:
        return Pass(stage, k, 0, is_backward)
    turn, within = divmod(k, pp * vpp)
    chunk, member = divmod(within, pp)
    return Pass(stage, turn * pp + member, vpp - 1 - chunk if is_backward else chunk, is_backward)


def _ready_s(work: Pass, layout: Layout, done: dict[Pass, float]) -> float | None:
    """When its input is there; None if that is not known yet."""
    before = _before(work, layout)
    return 0.0 if before is None else done.get(before)


def _before(work: Pass, layout: Layout) -> Pass | None:
    """The pass whose output it needs."""
    first, last = 0, layout.pp - 1
    m, c = work.microbatch, work.chunk
    if not work.is_backward:
        if work.stage > first:
            return Pass(work.stage - 1, m, c, False)
        return Pass(last, m, c - 1, False) if c > 0 else None
    if work.stage < last:
        return Pass(work.stage + 1, m, c, True)
    return Pass(first, m, c + 1, True) if c + 1 < layout.vpp else Pass(last, m, c, False)
