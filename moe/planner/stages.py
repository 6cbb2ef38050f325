"""Which layers each pipeline stage holds."""

from __future__ import annotations

from dataclasses import dataclass

from moe.planner.layout import balanced_stages
from moe.planner.settings import Job
from moe.planner.shape import Shape
from moe.planner.weights import Weight, block_weights, embedding_weights, head_weights, mtp_weights


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
    """Every stage, from the config's split or a balanced one."""
    shape, pp = job.shape, job.layout.pp
    layers = job.plan.stage_layers or balanced_stages(shape.num_layers, pp, head_layers(shape))
    stages, first = [], 0
    for index, count in enumerate(layers):
        dense = max(0, min(first + count, shape.num_dense_layers) - first)
        stages.append(
            Stage(
                index=index,
                dense_layers=dense,
                moe_layers=count - dense,
                has_embedding=index == 0,
                has_head=index == pp - 1,
            )
        )
        first += count
    return tuple(stages)


def head_layers(shape: Shape) -> float:
    """What the output head and MTP are worth in layers, by the matmul weights on a token's path."""

    def active(weights: tuple[Weight, ...]) -> float:
        used = {"expert": shape.top_k / shape.num_experts}
        return sum(weight.numel * used.get(weight.split, 1.0) for weight in weights if weight.matmul)

    heads = (1 + shape.mtp_layers) * shape.vocab_size * shape.hidden_size
    layer = active(block_weights(shape, dense=False))
    return (heads + shape.mtp_layers * active(mtp_weights(shape))) / layer


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
