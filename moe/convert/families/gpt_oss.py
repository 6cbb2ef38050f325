"""gpt-oss (arXiv 2508.10925): attention sinks, a window in every other layer, biased experts with a clamp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe.config.schema import AttentionSection, ModelSection, RouterSection
from moe.convert.families.base import (
    LAYER,
    OUR_EXPERTS,
    OUR_LAYER,
    OUR_ROUTER,
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
    trunk,
)
from moe.convert.mapping import Direct, InterleavedExperts, TensorMapping, TransposedExperts, Zeros
from moe.errors import InputError

_WINDOW, _FULL = "sliding_attention", "full_attention"


def _read_config(config: HfConfig) -> ModelSection:
    refuse_unless(config, "swiglu_alpha", 1.702)
    refuse_unless(config, "swiglu_limit", 7.0)
    num_layers = need(config, "num_hidden_layers")
    kinds = config.get("layer_types") or [_FULL if i % 2 else _WINDOW for i in range(num_layers)]
    every = _full_every(kinds)
    bias = bool(config.get("attention_bias", True))  # as all published ones
    attention = grouped_section(
        config,
        qkv_bias=bias,
        output_bias=bias,
        sinks=True,
        sliding_window=0 if every == 1 else need(config, "sliding_window"),
        full_attention_every=0 if every == 1 else every,
    )
    return ModelSection(
        **common_section(config),
        ffn_hidden_size=need(config, "intermediate_size"),
        num_experts=need(config, "num_local_experts", "num_experts"),
        expert_hidden_size=need(config, "intermediate_size"),
        expert_activation="clamped_swiglu",
        expert_bias=True,
        attention=attention,
        router=RouterSection(score_before_topk=False, logit_bias=True),
    )


def _full_every(kinds: Sequence[str]) -> int:
    """The n of which each n-th layer and no other sees all positions; 0 if none does."""
    every = kinds.index(_FULL) + 1 if _FULL in kinds else 0
    if list(kinds) != _kinds(len(kinds), every):
        raise InputError(
            f"config.json: layer_types={list(kinds)} cannot be computed: each n-th layer must be {_FULL}, "
            f"the others {_WINDOW}"
        )
    return every


def _kinds(num_layers: int, every: int) -> list[str]:
    return [_FULL if every and (i + 1) % every == 0 else _WINDOW for i in range(num_layers)]


def _write_config(model: ModelSection) -> dict[str, Any]:
    attention = model.attention
    return {
        **common_config(model),
        **grouped_config(attention),
        "attention_bias": attention.qkv_bias,
        "sliding_window": attention.sliding_window or None,
        "layer_types": _kinds(model.num_layers, _every(attention)),
        "intermediate_size": model.expert_hidden_size,
        "num_local_experts": model.num_experts,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    }


def _every(attention: AttentionSection) -> int:
    return attention.full_attention_every if attention.sliding_window else 1


def _table(model: ModelSection) -> tuple[TensorMapping, ...]:
    experts, router = f"{LAYER}.mlp.experts", f"{LAYER}.mlp.router"
    return (
        *trunk(),
        *layer_norms(),
        *grouped_attention(model),
        Direct(f"{OUR_LAYER}.self_attention.sinks.weight", f"{LAYER}.self_attn.sinks"),
        Direct(f"{OUR_ROUTER}.weight_ED", f"{router}.weight"),
        Direct(f"{OUR_ROUTER}.b_E", f"{router}.bias"),
        Zeros(f"{OUR_ROUTER}.bias_E"),
        InterleavedExperts(f"{OUR_EXPERTS}.w_gate_up_eGD", f"{experts}.gate_up_proj"),
        InterleavedExperts(f"{OUR_EXPERTS}.b_gate_up_eG", f"{experts}.gate_up_proj_bias"),
        TransposedExperts(f"{OUR_EXPERTS}.w_down_eDF", f"{experts}.down_proj"),
        Direct(f"{OUR_EXPERTS}.b_down_eD", f"{experts}.down_proj_bias"),
    )


GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", _read_config, _write_config, _table)
