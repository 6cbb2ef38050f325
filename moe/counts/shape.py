"""The sizes of a model that parameters, bytes and FLOPs depend on.

D model, F expert hidden, E experts, K top-k, V vocabulary, H attention heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.config.schema import AttentionSection, ModelSection


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention of every layer; latent attention (MLA, arXiv 2405.04434) if kv_lora_rank is not 0.

    Attributes:
        num_heads: Query heads H.
        num_groups: Key/value heads.
        qk_dim: Size of a query-key product, rotated part included.
        rope_dim: Size of the rotated part of a head.
        rotation_scaled: Rotations are multiplied by a number, too (YaRN, arXiv 2309.00071).
        v_dim: Size of a value head.
        q_lora_rank: Compressed query; 0 projects queries directly.
        kv_lora_rank: Compressed keys and values; 0 is grouped-query attention.
        qk_norm: RMSNorm of queries and keys, of each head or of all heads at once (OLMoE).
        qkv_bias: The projections to heads have biases.
        out_bias: The output projection has a bias.
        sinks: One learned logit a head (gpt-oss).
        window: Positions that a windowed layer sees, its own included; 0 is all.
        full_every: With a window, each n-th layer has none; 0: every layer has it.
    """

    num_heads: int
    num_groups: int
    qk_dim: int
    rope_dim: int
    v_dim: int
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False
    window: int = 0
    full_every: int = 0
    rotation_scaled: bool = False

    @property
    def is_latent(self) -> bool:
        """Whether it is multi-head latent attention."""
        return self.kv_lora_rank > 0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The decoder: dense layers first, then Mixture-of-Experts layers, then multi-token prediction (MTP).

    Attributes:
        num_layers: All layers, MTP excluded.
        num_dense_layers: The first layers, with a dense feed-forward.
        hidden_size: D.
        ffn_hidden_size: Inner width of a dense feed-forward.
        vocab_size: V, padding included.
        num_experts: E.
        top_k: K.
        expert_hidden_size: F.
        shared_hidden_size: Inner width of the shared expert; 0 without one.
        attention: Attention of every layer.
        tied: The output head is the embedding.
        expert_bias: Routed experts have biases (gpt-oss).
        logit_bias: The router has a trained bias (gpt-oss).
        num_groups: Equal groups of neighbouring experts, which usually lie in a node each.
        top_groups: Groups that a token's experts may come from.
        capacity_factor: An expert keeps at most this times its fair share; 0 drops nothing.
        mtp_layers: Extra prediction depths (arXiv 2412.19437, section 2.2).
    """

    num_layers: int
    num_dense_layers: int
    hidden_size: int
    ffn_hidden_size: int
    vocab_size: int
    num_experts: int
    top_k: int
    expert_hidden_size: int
    shared_hidden_size: int
    attention: Attention
    tied: bool = False
    expert_bias: bool = False
    logit_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    capacity_factor: float = 0.0
    mtp_layers: int = 0

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts, MTP excluded."""
        return self.num_layers - self.num_dense_layers


def shape_of(model: ModelSection) -> Shape:
    """The shape of the model that a config describes."""
    return Shape(
        num_layers=model.num_layers,
        num_dense_layers=model.num_dense_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        vocab_size=model.vocab_size,
        num_experts=model.num_experts,
        top_k=model.top_k,
        expert_hidden_size=model.expert_hidden_size,
        shared_hidden_size=model.shared_expert_hidden_size,
        attention=_attention_of(model.attention),
        tied=model.tie_embeddings,
        expert_bias=model.expert_bias,
        logit_bias=model.router.logit_bias,
        num_groups=model.router.num_groups,
        top_groups=model.router.top_groups,
        capacity_factor=model.router.capacity_factor,
        mtp_layers=model.mtp_layers,
    )


def _attention_of(attention: AttentionSection) -> Attention:
    if attention.kind == "gqa":
        return Attention(
            num_heads=attention.num_heads,
            num_groups=attention.query_groups,
            qk_dim=attention.head_dim,
            rope_dim=attention.rotary_dim or attention.head_dim,
            v_dim=attention.head_dim,
            qk_norm=attention.qk_norm,
            qkv_bias=attention.qkv_bias,
            out_bias=attention.output_bias,
            sinks=attention.sinks,
            window=attention.sliding_window,
            full_every=attention.full_attention_every,
            rotation_scaled=attention.yarn.rotation_scale != 1,
        )
    return Attention(
        num_heads=attention.num_heads,
        num_groups=attention.num_heads,
        qk_dim=attention.qk_nope_head_dim + attention.qk_rope_head_dim,
        rope_dim=attention.qk_rope_head_dim,
        v_dim=attention.v_head_dim,
        q_lora_rank=attention.q_lora_rank,
        kv_lora_rank=attention.kv_lora_rank,
    )
