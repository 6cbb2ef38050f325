"""Every setting of the config reaches the layer that Megatron runs."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from moe.config.schema import AttentionSection, ModelSection, RouterSection

# No setting at its default.
ROUTER = {
    "score": "sigmoid",
    "renormalize": True,
    "scale": 2.5,
    "num_groups": 4,
    "top_groups": 2,
    "logit_bias": True,
    "jitter": 0.1,
    "capacity_factor": 1.5,
    "rounding": "down",
    "tile_rows": 64,
    "aux_loss": "batch",
    "aux_loss_coeff": 0.5,
    "z_loss_coeff": 0.25,
}
# By the layer's names; 8-bit experts have no other activation and no biases.
EXPERTS = (
    {"activation": "geglu", "expert_bias": True, "precision": "wide"},
    {"activation": "swiglu", "expert_bias": False, "precision": "fp8", "fp8_input_store": True},
    {"activation": "swiglu", "expert_bias": False, "precision": "mxfp8", "wide_into_activation": True},
)
OFF = {"fp8_input_store": False, "wide_into_activation": False}
SIZES = {"hidden_size": 16, "num_experts": 8, "top_k": 3, "expert_hidden_size": 8}


def settings_of_the_layer(experts: dict[str, object], **router: object) -> dict[str, object]:
    from moe.model.moe_adapter import layer_config

    model = ModelSection(
        num_layers=1,
        ffn_hidden_size=16,
        vocab_size=16,
        attention=AttentionSection(num_heads=2),
        router=RouterSection(**router),
        **SIZES,
        **{f"expert_{name.removeprefix('expert_')}": value for name, value in experts.items()},
    )
    return asdict(layer_config(model, "torch"))


@pytest.mark.parametrize("experts", EXPERTS, ids=["bias", "8 bits", "8 bits and wide"])
def test_settings_reach_the_layer(experts):
    settings = settings_of_the_layer(experts, **ROUTER)
    expected = {**SIZES, **ROUTER, **OFF, **experts, "backend": "torch", "score_before_topk": True}
    # Megatron's own: the shared expert, the initial weights, the order of axes.
    assert settings == expected | {"shared_expert_hidden_size": 0, "init_std": 0.02, "batch_first": False}


@pytest.mark.parametrize("before", [True, False])
def test_the_order_of_softmax_and_choice_reaches_the_layer(before):
    assert settings_of_the_layer({}, score_before_topk=before)["score_before_topk"] is before
