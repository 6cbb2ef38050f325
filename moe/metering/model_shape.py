"""The sizes that the closed-form counts need, from a run's config."""

from __future__ import annotations

from moe.config.schema import ModelSection
from moe.metering.flops import GqaShape, MlaShape, ModelShape


def model_shape(model: ModelSection) -> ModelShape:
    """The shape of the model that a config describes."""
    attention = model.attention
    kind: GqaShape | MlaShape
    if attention.kind == "gqa":
        kind = GqaShape(
            num_heads=attention.num_heads,
            num_query_groups=attention.query_groups,
            head_dim=attention.head_dim,
            qk_norm=attention.qk_norm,
            qkv_bias=attention.qkv_bias,
            output_bias=attention.output_bias,
            sinks=attention.sinks,
        )
    else:
        kind = MlaShape(
            num_heads=attention.num_heads,
            q_lora_rank=attention.q_lora_rank,
            kv_lora_rank=attention.kv_lora_rank,
            qk_nope_head_dim=attention.qk_nope_head_dim,
            qk_rope_head_dim=attention.qk_rope_head_dim,
            v_head_dim=attention.v_head_dim,
        )
    return ModelShape(
        num_layers=model.num_layers,
        num_dense_layers=model.num_dense_layers,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        tied_embeddings=model.tie_embeddings,
        ffn_hidden_size=model.ffn_hidden_size,
        num_experts=model.num_experts,
        top_k=model.top_k,
        expert_hidden_size=model.expert_hidden_size,
        shared_expert_hidden_size=model.shared_expert_hidden_size,
        attention=kind,
        mtp_layers=model.mtp_layers,
        expert_bias=model.expert_bias,
        logit_bias=model.router.logit_bias,
    )
