"""A graph that is kept can be walked back twice: what is recomputed is computed again each time."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from moe.model.context_parallel import SequenceSplit
from moe.model.recompute import recomputed


def test_logits_are_noted_in_the_forward_only():
    one_rank = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    split = SequenceSplit(one_rank, one_rank)
    split.logits = noting = object()
    seen = []

    def attention(x):
        seen.append(split.logits)
        return (x * x).sin()

    x = torch.randn(3, requires_grad=True)
    y = recomputed(SimpleNamespace(recompute_granularity="selective"), attention, x, again=split.logits_known)
    y.sum().backward(retain_graph=True)
    once = x.grad.clone()
    y.sum().backward()
    assert seen == [noting, None, None]
    assert split.logits is noting
    assert torch.equal(x.grad, 2 * once)
