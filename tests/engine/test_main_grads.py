"""Experts whose backward adds to Megatron's main gradients leave the bits that Megatron's adding leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import Layout, batches, config_of
from ranks_pool import RankPool


def main_grads(layout: Layout, fused: bool) -> tuple[dict[str, torch.Tensor], set[bool]]:
    """Gradients of two micro-batches, reduced over ranks, and whether experts added theirs themselves."""
    from moe.engine.megatron import MegatronEngine

    torch.set_num_threads(1)
    config = config_of(layout)
    engine = MegatronEngine(config)
    try:
        (ddp,), (model,) = engine.ddps, engine.models
        experts = [adapter.layer.experts for adapter in engine.moe_layers.values()]
        assert all(each.adds_to_main_grads for each in experts)
        for each in experts:
            each.adds_to_main_grads = fused
        ddp.train()
        ddp.zero_grad_buffer()
        data = batches(config, 0, torch.distributed.get_rank(), torch.distributed.get_world_size())
        for _ in range(2):
            output, loss_of = engine._forward_step(data, ddp)
            loss, _ = loss_of(output)
            loss.backward()
        ddp.finish_grad_sync()
        marks = {weight.grad_added_to_main_grad for each in experts for weight in each.parameters()}
        assert all(parameter.grad is None for parameter in model.parameters())
        return {name: p.main_grad.clone() for name, p in model.named_parameters()}, marks
    finally:
        engine.close()


@pytest.fixture(scope="module")
def pool(start_ranks: Any) -> RankPool:
    ranks: RankPool = start_ranks(2, init_process_group=False)
    return ranks


@pytest.mark.parametrize("changes", ["ep=2", "ep=2 precision=bf16", "ep=2 recompute=full"])
def test_fused_gradients_have_the_bits_of_added_ones(pool: RankPool, changes: str) -> None:
    layout = Layout("gqa", 2, changes)
    for (fused, marks), (added, no_marks) in zip(
        pool.run(main_grads, layout, True), pool.run(main_grads, layout, False), strict=True
    ):
        assert (marks, no_marks) == ({True}, {False})
        assert [name for name, grad in added.items() if not grad.equal(fused[name])] == []
        assert all(bool(grad.any()) for name, grad in fused.items() if ".experts." in name)
