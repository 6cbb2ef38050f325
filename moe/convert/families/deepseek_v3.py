"""DeepSeek-V3 (arXiv 2412.19437) and Kimi-K2: latent attention, biased sigmoid routing, shared experts."""

from __future__ import annotations

import math
from typing import Any

from moe.config.schema import AttentionSection, ModelSection, RouterSection
from moe.convert.families.base import (
    LAYER,
    OUR_LAYER,
    OUR_ROUTER,
    Family,
    HfConfig,
    common_config,
    common_section,
    dense_feed_forward,
    layer_norms,
    need,
    prediction_copies,
    predictions,
    refuse_unless,
    rope_config,
    rope_parameters,
    routed_experts,
    trunk,
    yarn_section,
)
from moe.convert.mapping import Direct, GateUp, PerExpert, TensorMapping


def _read_config(config: HfConfig) -> ModelSection:
    refuse_unless(config, "attention_bias", False)
    refuse_unless(config, "rope_interleave", True)
    refuse_unless(config, "rms_norm_eps", 1e-6)  # the latents' norms take this one whatever the config says
    attention = AttentionSection(
        kind="mla",
        num_heads=need(config, "num_attention_heads"),
        rope_base=rope_parameters(config)["rope_theta"],
        yarn=yarn_section(config, scales_logits=True),
        q_lora_rank=config.get("q_lora_rank") or 0,
        kv_lora_rank=need(config, "kv_lora_rank"),
        qk_nope_head_dim=need(config, "qk_nope_head_dim"),
        qk_rope_head_dim=need(config, "qk_rope_head_dim"),
        v_head_dim=need(config, "v_head_dim"),
    )
    return ModelSection(**common_section(config), **sigmoid_experts_section(config), attention=attention)


def _write_config(model: ModelSection) -> dict[str, Any]:
    attention = model.attention
    yarn = attention.yarn
    rope = rope_config(attention.model_copy(update={"yarn": yarn.model_copy(update={"softmax_scale": 1.0})}))
    if yarn.factor > 1 and yarn.softmax_scale != 1.0:
        rope["mscale_all_dim"] = (math.sqrt(yarn.softmax_scale) - 1) / (0.1 * math.log(yarn.factor))
    return {
        **common_config(model),
        **sigmoid_experts_config(model),
        "attention_bias": False,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "rope_parameters": rope,
        "rope_interleave": True,
        "q_lora_rank": attention.q_lora_rank or None,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
    }


def sigmoid_experts_section(config: HfConfig) -> dict[str, Any]:
    """Feed-forwards and router of DeepSeek-V3 and of those that follow it."""
    for name, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        refuse_unless(config, name, value)
    expert = need(config, "moe_intermediate_size")
    router = RouterSection(
        score="sigmoid",
        renormalize=need(config, "norm_topk_prob"),
        scale=need(config, "routed_scaling_factor"),
        num_groups=config.get("n_group") or 1,
        top_groups=config.get("topk_group") or 1,
    )
    return {
        "num_dense_layers": config.get("first_k_dense_replace") or 0,
        "ffn_hidden_size": need(config, "intermediate_size"),
        "num_experts": need(config, "n_routed_experts"),
        "expert_hidden_size": expert,
        "shared_expert_hidden_size": expert * need(config, "n_shared_experts"),
        "router": router,
        "mtp_layers": config.get("num_nextn_predict_layers") or config.get("num_mtp_layers") or 0,
    }


def sigmoid_experts_config(model: ModelSection) -> dict[str, Any]:
    """The keys that `sigmoid_experts_section` reads."""
    router = model.router
    return {
        "first_k_dense_replace": model.num_dense_layers,
        "intermediate_size": model.ffn_hidden_size,
        "n_routed_experts": model.num_experts,
        "moe_intermediate_size": model.expert_hidden_size,
        "n_shared_experts": model.shared_expert_hidden_size // model.expert_hidden_size,
        "norm_topk_prob": router.renormalize,
        "routed_scaling_factor": router.scale,
        "n_group": router.num_groups,
        "topk_group": router.top_groups,
        "num_nextn_predict_layers": model.mtp_layers,
    }


def sigmoid_experts() -> tuple[Direct | GateUp | PerExpert, ...]:
    """Dense feed-forward, router with its bias, routed and shared experts of a layer."""
    return (
        *dense_feed_forward(f"{OUR_LAYER}.mlp", f"{LAYER}.mlp"),
        *dense_feed_forward(f"{OUR_LAYER}.mlp.layer.shared_expert.mlp", f"{LAYER}.mlp.shared_experts"),
        *routed_experts(f"{LAYER}.mlp"),
        Direct(f"{OUR_ROUTER}.bias_E", f"{LAYER}.mlp.gate.e_score_correction_bias"),
    )


def _latent_attention(model: ModelSection) -> tuple[Direct, ...]:
    query = "q_b_proj" if model.attention.q_lora_rank else "q_proj"
    names = {
        "linear_q_down": "q_a_proj",
        "q_layernorm": "q_a_layernorm",
        "linear_q_up": query,
        "linear_kv_down": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
        "linear_kv_up": "kv_b_proj",
        "linear_proj": "o_proj",
    }
    return tuple(
        Direct(f"{OUR_LAYER}.self_attention.{our}.weight", f"{LAYER}.self_attn.{their}.weight")
        for our, their in names.items()
    )


def _table(model: ModelSection) -> tuple[TensorMapping, ...]:
    layer = (*layer_norms(), *_latent_attention(model), *sigmoid_experts())
    return (*trunk(), *layer, *predictions(model, layer))


DEEPSEEK_V3 = Family(
    "deepseek_v3", "DeepseekV3ForCausalLM", _read_config, _write_config, _table, prediction_copies
)
