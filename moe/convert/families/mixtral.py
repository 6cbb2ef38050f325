"""Mixtral (arXiv 2401.04088): softmax over the chosen experts, no norms in the attention."""

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
    refuse_unless(config, "router_jitter_noise", 0.0)
    return ModelSection(
        **common_section(config),
        ffn_hidden_size=need(config, "intermediate_size"),
        num_experts=need(config, "num_local_experts"),
        expert_hidden_size=need(config, "intermediate_size"),
        attention=grouped_section(config, sliding_window=config.get("sliding_window") or 0),
        router=RouterSection(score_before_topk=False),
    )


def _write_config(model: ModelSection) -> dict[str, Any]:
    return {
        **common_config(model),
        **grouped_config(model.attention),
        "sliding_window": model.attention.sliding_window or None,
        "intermediate_size": model.expert_hidden_size,
        "num_local_experts": model.num_experts,
    }


def _table(model: ModelSection) -> tuple[TensorMapping, ...]:
    experts = softmax_experts(f"{LAYER}.block_sparse_moe", gate="w1", up="w3", down="w2")
    return (*trunk(), *layer_norms(), *grouped_attention(model), *experts)


MIXTRAL = Family("mixtral", "MixtralForCausalLM", _read_config, _write_config, _table)
