"""Qwen3-MoE (arXiv 2505.09388): query and key norms in each head, softmax router, no shared expert."""

from __future__ import annotations

from typing import Any

from moe.config.schema import ModelSection, RouterSection
from moe.convert.families.base import (
    LAYER,
    OUR_LAYER,
    Family,
    HfConfig,
    common_config,
    common_section,
    dense_feed_forward,
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
from moe.errors import InputError


def _read_config(config: HfConfig) -> ModelSection:
    refuse_unless(config, "decoder_sparse_step", 1)
    bias = bool(config.get("attention_bias", False))
    attention = grouped_section(
        config,
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
        sliding_window=config.get("sliding_window") or 0 if config.get("use_sliding_window") else 0,
    )
    return ModelSection(
        **common_section(config),
        num_dense_layers=_first_layers(config.get("mlp_only_layers") or []),
        ffn_hidden_size=need(config, "intermediate_size"),
        num_experts=need(config, "num_experts", "num_local_experts"),
        expert_hidden_size=need(config, "moe_intermediate_size"),
        attention=attention,
        router=RouterSection(renormalize=need(config, "norm_topk_prob")),
    )


def _first_layers(dense: list[int]) -> int:
    """How many there are; they must be the first."""
    if sorted(dense) != list(range(len(dense))):
        raise InputError(
            f"config.json: mlp_only_layers={dense} cannot be computed: dense layers must be the first ones"
        )
    return len(dense)


def _write_config(model: ModelSection) -> dict[str, Any]:
    attention = model.attention
    return {
        **common_config(model),
        **grouped_config(attention),
        "attention_bias": attention.qkv_bias,
        "use_sliding_window": attention.sliding_window > 0,
        "sliding_window": attention.sliding_window or None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(model.num_dense_layers)),
        "intermediate_size": model.ffn_hidden_size,
        "num_experts": model.num_experts,
        "moe_intermediate_size": model.expert_hidden_size,
        "norm_topk_prob": model.router.renormalize,
    }


def _table(model: ModelSection) -> tuple[TensorMapping, ...]:
    return (
        *trunk(),
        *layer_norms(),
        *grouped_attention(model),
        *dense_feed_forward(f"{OUR_LAYER}.mlp", f"{LAYER}.mlp"),
        *softmax_experts(f"{LAYER}.mlp"),
    )


QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", _read_config, _write_config, _table)
