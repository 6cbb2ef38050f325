"""GLM-4.5 (arXiv 2508.06471): grouped queries that turn in part, the routing of DeepSeek-V3."""

from __future__ import annotations

from typing import Any

from moe.config.schema import ModelSection
from moe.convert.families.base import (
    Family,
    HfConfig,
    common_config,
    common_section,
    grouped_attention,
    grouped_config,
    grouped_section,
    head_dim,
    layer_norms,
    prediction_copies,
    predictions,
    rope_parameters,
    trunk,
)
from moe.convert.families.deepseek_v3 import (
    sigmoid_experts,
    sigmoid_experts_config,
    sigmoid_experts_section,
)
from moe.convert.mapping import TensorMapping

_ROTARY_SHARE = 0.5  # of a head, where the config does not say; the default of transformers' class


def _read_config(config: HfConfig) -> ModelSection:
    share = rope_parameters(config).get("partial_rotary_factor") or _ROTARY_SHARE
    attention = grouped_section(
        config,
        qk_norm="head" if config.get("use_qk_norm") else "none",
        qkv_bias=bool(config.get("attention_bias", False)),
        rotary_dim=int(head_dim(config) * share),
    )
    return ModelSection(**common_section(config), **sigmoid_experts_section(config), attention=attention)


def _write_config(model: ModelSection) -> dict[str, Any]:
    attention = model.attention
    share = (attention.rotary_dim or attention.head_dim) / attention.head_dim
    keys = grouped_config(attention)
    keys["rope_parameters"]["partial_rotary_factor"] = share
    return {
        **common_config(model),
        **keys,
        **sigmoid_experts_config(model),
        "attention_bias": attention.qkv_bias,
        "use_qk_norm": attention.qk_norm == "head",
    }


def _table(model: ModelSection) -> tuple[TensorMapping, ...]:
    layer = (*layer_norms(), *grouped_attention(model), *sigmoid_experts())
    return (*trunk(), *layer, *predictions(model, layer))


GLM4_MOE = Family("glm4_moe", "Glm4MoeForCausalLM", _read_config, _write_config, _table, prediction_copies)
