"""How the layers of a model are shared out over a pipeline, and which tensors each stage holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

from moe.counts.shape import Shape
from moe.counts.weights import Weight, block_weights, embedding_weights, head_weights, mtp_weights


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


def chunk_layers(shape: Shape, pp: int, vpp: int) -> tuple[int, ...]:
    """Layers of each of the pp * vpp chunks of a pipeline, in the order of the model; balanced."""
    return balanced_chunks(
        shape.num_layers, (pp, vpp), head_layers(shape), starts_dense=shape.num_dense_layers > 0
    )


@cache
def balanced_chunks(
    num_layers: int, chunks: tuple[int, int], head_layers: float, *, starts_dense: bool = False
) -> tuple[int, ...]:
    """Layers of each chunk, so that the slowest rank is as fast as can be, and its chunks are even.

    Chunk i is on rank i % pp, so a rank's load is that of all its chunks. The last chunk also has the output
    head and MTP, worth `head_layers` layers; a dense layer counts as one with experts.

    Args:
        num_layers: Of the model.
        chunks: (ranks of the pipeline, chunks of each).
        head_layers: What follows the last layer, in layers.
        starts_dense: The first layers have no experts.
    """
    pp, vpp = chunks
    ranks = [
        _shared_out(layers, vpp, head_layers * (rank == pp - 1), starts_dense=starts_dense and rank == 0)
        for rank, layers in enumerate(_shared_out(num_layers, pp, head_layers, starts_dense=starts_dense))
    ]
    return tuple(rank[turn] for turn in range(vpp) for rank in ranks)


def _shared_out(num_layers: int, parts: int, head_layers: float, *, starts_dense: bool) -> list[int]:
    """Layers of each part; the last one also has the head. Exact: the smallest ceiling under which all fit.

    Where layers cannot be shared out evenly the first parts hold fewer: they also have the embedding, and
    keep the most activations. But dense layers hold few weights and exchange nothing, so the part that starts
    with them gives up a layer only after the other ones.
    """
    room = [0] * parts
    for ceiling in range(1, num_layers + 1):
        room = [ceiling] * (parts - 1) + [max(0, int(ceiling - head_layers)) if parts > 1 else ceiling]
        if sum(room) >= num_layers:
            break
    first, *others = range(parts if head_layers == 0 else max(parts - 1, 1))
    givers = [*others, first] if starts_dense else [first, *others]
    for part in givers[: sum(room) - num_layers]:  # below the number of parts, or a lower ceiling would do
        room[part] -= 1
    return room


def head_layers(shape: Shape) -> float:
    """What the output head and MTP are worth in layers, by the matmul weights on a token's path."""

    def active(weights: tuple[Weight, ...]) -> float:
        used = {"expert": shape.top_k / shape.num_experts}
        return sum(weight.numel * used.get(weight.split, 1.0) for weight in weights if weight.matmul)

    heads = (1 + shape.mtp_layers) * shape.vocab_size * shape.hidden_size
    layer = active(block_weights(shape, dense=False))
    return (heads + shape.mtp_layers * active(mtp_weights(shape))) / layer


def split_stages(shape: Shape, layers: tuple[int, ...], pp: int) -> tuple[Stage, ...]:
    """Every stage of a model whose chunks have so many layers; chunk i is on stage i % pp."""
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


def stage_parts(shape: Shape, stage: Stage) -> tuple[tuple[tuple[Weight, ...], int], ...]:
    """Tensors of a stage that come together, and how often they do."""
    # MTP embeds the next token; a tied head is the embedding.
    has_copy = not stage.has_embedding and stage.has_head and (shape.tied or shape.mtp_layers)
    return (
        (block_weights(shape, dense=True), stage.dense_layers),
        (block_weights(shape, dense=False), stage.moe_layers),
        (embedding_weights(shape), int(stage.has_embedding or has_copy)),
        (head_weights(shape), int(stage.has_head)),
        (mtp_weights(shape), shape.mtp_layers if stage.has_head else 0),
    )
