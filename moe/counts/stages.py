"""How the layers of a model are shared out over a pipeline, unless its config says."""

from __future__ import annotations

from functools import cache

from moe.counts.shape import Shape
from moe.counts.weights import Weight, block_weights, mtp_weights


def chunk_layers(shape: Shape, chunks: int) -> tuple[int, ...]:
    """Layers of each of the pp * vpp chunks of a pipeline, in the order of the model; balanced."""
    return balanced_chunks(shape.num_layers, chunks, head_layers(shape))


@cache
def balanced_chunks(num_layers: int, chunks: int, head_layers: float) -> tuple[int, ...]:
    """Layers of each chunk, so that the slowest is as fast as can be.

    The last chunk also has the output head and MTP, worth `head_layers` layers. Where layers cannot be shared
    out evenly the first ones hold fewer: they also have the embedding, and keep the most activations. Exact:
    the smallest ceiling under which all layers fit.
    """
    if chunks == 1:
        return (num_layers,)
    room = [0] * chunks
    for ceiling in range(1, num_layers + 1):
        room = [ceiling] * (chunks - 1) + [max(0, int(ceiling - head_layers))]
        if sum(room) >= num_layers:
            break
    excess = sum(room) - num_layers
    layers = []
    for index, most in enumerate(room):
        less = min(most, -(-excess // (chunks - index)) if index < chunks - 1 else excess)
        excess -= less
        layers.append(most - less)
    return tuple(layers)


def head_layers(shape: Shape) -> float:
    """What the output head and MTP are worth in layers, by the matmul weights on a token's path."""

    def active(weights: tuple[Weight, ...]) -> float:
        used = {"expert": shape.top_k / shape.num_experts}
        return sum(weight.numel * used.get(weight.split, 1.0) for weight in weights if weight.matmul)

    heads = (1 + shape.mtp_layers) * shape.vocab_size * shape.hidden_size
    layer = active(block_weights(shape, dense=False))
    return (heads + shape.mtp_layers * active(mtp_weights(shape))) / layer
