"""Which layers each pipeline stage holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from moe.counts.counts import params_on_rank
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

    @property
    def kind(self) -> tuple[int, int, bool, bool]:
        """What it holds; stages in the middle are mostly of one kind."""
        return self.dense_layers, self.moe_layers, self.has_embedding, self.has_head


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
    return tuple(weight for weights, count in _parts(shape, stage) for weight in weights * count)


def held_params(job: Job, stage: Stage, *, of_muon: bool = False) -> tuple[int, int]:
    """(dense, expert) parameters that a rank of the stage holds, or those of them that Muon can move."""
    dense = experts = 0
    for weights, count in _parts(job.shape, stage):
        chosen = [weight for weight in weights if weight.is_of_muon] if of_muon else weights
        held = params_on_rank(chosen, tp=job.layout.tp, expert_ranks=job.layout.expert_ranks)
        dense, experts = dense + count * held[0], experts + count * held[1]
    return dense, experts


def router_params(job: Job, stage: Stage) -> int:
    """Those of routers, which stay in fp32 on every rank."""
    parts = _parts(job.shape, stage)
    return sum(count * w.numel for weights, count in parts for w in weights if w.name == "router")


def _parts(shape: Shape, stage: Stage) -> tuple[tuple[tuple[Weight, ...], int], ...]:
    """Tensors that come together, and how often they do."""
    # MTP embeds the next token; a tied head is the embedding.
    has_copy = not stage.has_embedding and stage.has_head and (shape.tied or shape.mtp_layers)
    return (
        (block_weights(shape, dense=True), stage.dense_layers),
        (block_weights(shape, dense=False), stage.moe_layers),
        (embedding_weights(shape), int(stage.has_embedding or has_copy)),
        (head_weights(shape), int(stage.has_head)),
        (mtp_weights(shape), shape.mtp_layers if stage.has_head else 0),
    )
