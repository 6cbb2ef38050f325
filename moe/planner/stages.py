"""Which layers each pipeline stage holds."""

from __future__ import annotations

from moe.counts.counts import params_on_rank
from moe.counts.shape import Shape
from moe.counts.stages import Stage, chunk_layers, split_stages, stage_parts
from moe.counts.weights import Weight
from moe.planner.settings import Job

__all__ = ["Stage", "held_params", "router_params", "stage_weights", "stages_of", "wide_params"]


def stages_of(job: Job) -> tuple[Stage, ...]:
    """Every stage, from the config's split or a balanced one; chunk i of the model is on stage i % pp."""
    layout = job.layout
    layers = job.stage_layers or chunk_layers(job.shape, layout.pp, layout.vpp)
    return split_stages(job.shape, layers, layout.pp)


def stage_weights(shape: Shape, stage: Stage) -> tuple[Weight, ...]:
    """The tensors of a stage; the last one has a copy of a tied embedding if it is not the first, too."""
    return tuple(weight for weights, count in stage_parts(shape, stage) for weight in weights * count)


def held_params(job: Job, stage: Stage, *, of_muon: bool = False) -> tuple[int, int]:
    """(dense, expert) parameters that a rank of the stage holds, or those of them that Muon can move."""
    dense = experts = 0
    for weights, count in stage_parts(job.shape, stage):
        chosen = [weight for weight in weights if weight.is_of_muon] if of_muon else weights
        held = params_on_rank(chosen, tp=job.layout.tp, expert_ranks=job.layout.expert_ranks)
        dense, experts = dense + count * held[0], experts + count * held[1]
    return dense, experts


def router_params(job: Job, stage: Stage) -> int:
    """Those of routers, which stay in fp32 on every rank."""
    parts = stage_parts(job.shape, stage)
    return sum(count * w.numel for weights, count in parts for w in weights if w.name == "router")


def wide_params(job: Job, stage: Stage) -> int:
    """Those on a rank that never have 8 bits: of embeddings, and of a head of its own unless fp8_head.

    Megatron-Core makes 8-bit weights in transformer blocks only (0.16.1, transformer_block.py).
    """
    names = {"embedding"} if job.plan.fp8_head else {"embedding", "head"}
    wide = [weight for weight in stage_weights(job.shape, stage) if weight.name in names]
    return params_on_rank(wide, tp=job.layout.tp, expert_ranks=job.layout.expert_ranks)[0]
