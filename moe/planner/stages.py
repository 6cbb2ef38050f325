"""Which layers each pipeline stage holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from moe.counts.shape import Shape
from moe.counts.stages import chunk_layers
from moe.counts.weights import Weight, block_weights, embedding_weights, head_weights, mtp_weights
from moe.planner.settings import Job


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A pipeline stage.

    Attributes:
        index: From 0.
        dense_layers: Layers with a dense feed-forward.
        moe_layers: Layers with experts, MTP excluded.
        has_embedding: It is the first.
        has_head: It is the last; MTP, if any, is here too.
    """

    index: int
    dense_layers: int
    moe_layers: int
    has_embedding: bool
    has_head: bool


def stages_of(job: Job) -> tuple[Stage, ...]:
    """Every stage, from the config's split or a balanced one; chunk i of the model is on stage i % pp."""
    shape, pp = job.shape, job.layout.pp
    layers = job.stage_layers or chunk_layers(shape, pp * job.layout.vpp)
    firsts = [0, *accumulate(layers)]
    dense = [max(0, min(end, shape.num_dense_layers) - first) for first, end in pairwise(firsts)]
    return tuple(
        Stage(
            index=index,
            dense_layers=sum(dense[index::pp]),
            moe_layers=sum(layers[index::pp]) - sum(dense[index::pp]),
            has_embedding=index == 0,
            has_head=index == pp - 1,
        )
        for index in range(pp)
    )


def stage_weights(shape: Shape, stage: Stage) -> tuple[Weight, ...]:
    """The tensors of a stage; the last one has a copy of a tied embedding if it is not the first, too."""
    weights = block_weights(shape, dense=True) * stage.dense_layers
    weights += block_weights(shape, dense=False) * stage.moe_layers
    if stage.has_embedding:
        weights += embedding_weights(shape)
    if stage.has_head:
        weights += head_weights(shape) + mtp_weights(shape) * shape.mtp_layers
    if not stage.has_embedding and stage.has_head and (shape.tied or shape.mtp_layers):
        weights += embedding_weights(shape)  # MTP embeds the next token
    return weights
