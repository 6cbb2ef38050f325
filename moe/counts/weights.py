"""Every trained tensor of a model: its size, how ranks split it, and whether it counts as FLOPs.

The one place that knows parameters; counts.py, memory.py and ops.py derive theirs from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from moe.counts.shape import Attention, Shape

# tp: over tensor-parallel ranks; expert: over ep * etp ranks; whole: every rank holds all of it.
Split = Literal["tp", "expert", "whole"]


@dataclass(frozen=True)
class Weight:
    """A tensor, or several alike.

    Attributes:
        name: What it is.
        numel: Numbers in it, over all ranks.
        split: How ranks divide it.
        matmul: It is multiplied with every token that reaches it, by the FLOPs convention of counts.py.
    """

    name: str
    numel: int
    split: Split
    matmul: bool = True

    @property
    def is_of_muon(self) -> bool:
        """Whether Muon moves it, if asked: matrices of layers and experts, not the head."""
        return self.matmul and self.name != "head"


@cache
def block_weights(shape: Shape, *, dense: bool) -> tuple[Weight, ...]:
    """The tensors of one transformer layer."""
    D = shape.hidden_size
    feed_forward = _dense_weights(shape) if dense else _moe_weights(shape)
    return (*_attention_weights(shape.attention, D), *feed_forward, _norm("layer norms", 2 * D))


@cache
def mtp_weights(shape: Shape) -> tuple[Weight, ...]:
    """The tensors of one prediction depth: it joins two streams, is an expert layer, and shares the head."""
    D = shape.hidden_size
    join = Weight("mtp projection", 2 * D * D, "tp")
    return (*block_weights(shape, dense=False), join, _norm("mtp norms", 3 * D))


@cache
def embedding_weights(shape: Shape) -> tuple[Weight, ...]:
    """The input embedding."""
    return (Weight("embedding", shape.vocab_size * shape.hidden_size, "tp", matmul=False),)


@cache
def head_weights(shape: Shape) -> tuple[Weight, ...]:
    """The final norm and the output head, whose tensor is the embedding's if they are tied."""
    head = () if shape.tied else (Weight("head", shape.vocab_size * shape.hidden_size, "tp"),)
    return (_norm("final norm", shape.hidden_size), *head)


def _norm(name: str, numel: int) -> Weight:
    return Weight(name, numel, "whole", matmul=False)


def _attention_weights(attention: Attention, hidden_size: int) -> tuple[Weight, ...]:
    project = _latent_weights if attention.is_latent else _grouped_weights
    H, D = attention.num_heads, hidden_size
    weights = [*project(attention, D), Weight("attention out", H * attention.v_dim * D, "tp")]
    if attention.out_bias:
        weights.append(Weight("attention out bias", D, "whole", matmul=False))
    if attention.sinks:
        weights.append(Weight("sinks", H, "tp", matmul=False))
    return tuple(weights)


def _grouped_weights(attention: Attention, hidden_size: int) -> list[Weight]:
    q = attention.num_heads * attention.qk_dim
    kv = attention.num_groups * (attention.qk_dim + attention.v_dim)
    weights = [Weight("qkv", hidden_size * (q + kv), "tp")]
    if attention.qkv_bias:
        weights.append(Weight("qkv bias", q + kv, "tp", matmul=False))
    if attention.qk_norm == "head":
        weights.append(_norm("qk norm", 2 * attention.qk_dim))
    if attention.qk_norm == "full":
        weights.append(_norm("qk norm", q + attention.num_groups * attention.qk_dim))
    return weights


def _latent_weights(attention: Attention, hidden_size: int) -> list[Weight]:
    """Compressions are whole on every rank, as in our engine and in megatron-core; projections are split."""
    D, H, c = hidden_size, attention.num_heads, attention.kv_lora_rank
    nope_dim = attention.qk_dim - attention.rope_dim
    q_rank = attention.q_lora_rank
    weights = [Weight("q up", (q_rank or D) * H * attention.qk_dim, "tp")]
    if q_rank:
        weights += [Weight("q down", D * q_rank, "whole"), _norm("q norm", q_rank)]
    return [
        *weights,
        Weight("kv down", D * (c + attention.rope_dim), "whole"),
        _norm("kv norm", c),
        Weight("kv up", c * H * (nope_dim + attention.v_dim), "tp"),
    ]


def _dense_weights(shape: Shape) -> tuple[Weight, ...]:
    return (Weight("dense mlp", _swiglu(shape.hidden_size, shape.ffn_hidden_size), "tp"),)


def _moe_weights(shape: Shape) -> tuple[Weight, ...]:
    D, F, E = shape.hidden_size, shape.expert_hidden_size, shape.num_experts
    weights = [
        # The convention leaves the router out; that is what reproduces published FLOPs.
        Weight("router", E * D, "whole", matmul=False),
        Weight("experts", E * _swiglu(D, F), "expert"),
    ]
    if shape.logit_bias:
        weights.append(Weight("router bias", E, "whole", matmul=False))
    if shape.expert_bias:
        weights.append(Weight("expert bias", E * (2 * F + D), "expert", matmul=False))
    if shape.shared_hidden_size:
        weights.append(Weight("shared expert", _swiglu(D, shape.shared_hidden_size), "tp"))
    return tuple(weights)


def _swiglu(hidden_size: int, ffn_hidden_size: int) -> int:
    """Gate, up and down projection (arXiv 2002.05202)."""
    return 3 * hidden_size * ffn_hidden_size
