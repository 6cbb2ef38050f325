"""OLMoE (arXiv 2409.02060): query and key norms over all heads, every layer with experts."""

from __future__ import annotations

from typing import Any

from moe.config.schema import ModelSection, RouterSection
from moe.convert.families.base import (
    LAYER,
    Family,
    HfConfig,
    common_config,
    common_section,
    grouped_attention,
    grouped_config,
    grouped_section,
    layer_norms,
    need,
    refuse_unless,
    softmax_experts,
    trunk,
)
from moe.convert.mapping import TensorMapping


def _read_config(config: HfConfig) -> ModelSection:
    refuse_unless(config, "clip_qkv", None)
    heads = need(config, "num_attention_heads")
    refuse_unless(config, "head_dim", None, need(config, "hidden_size") // heads)  # so wide are its norms
    bias = bool(config.get("attention_bias", False))
    return ModelSection(
        **common_section(config),
        ffn_hidden_size=need(config, "intermediate_size"),
        num_experts=need(config, "num_experts", "num_local_experts"),
        expert_hidden_size=need(config, "intermediate_size"),
        attention=grouped_section(config, qk_norm="full", qkv_bias=bias, output_bias=bias),
        router=RouterSection(renormalize=need(config, "norm_topk_prob")),
    )


def _write_config(model: ModelSection) -> dict[str, Any]:
    return {
        **common_config(model),
        **grouped_config(model.attention),
        "attention_bias": model.attention.qkv_bias,
        "intermediate_size": model.expert_hidden_size,
        "num_experts": model.num_experts,
        "norm_topk_prob": model.router.renormalize,
    }


def _table(model: ModelSection) -> tuple[TensorMapping, ...]:
    return (*trunk(), *layer_norms(), *grouped_attention(model), *softmax_experts(f"{LAYER}.mlp"))


OLMOE = Family("olmoe", "OlmoeForCausalLM", _read_config, _write_config, _table)
