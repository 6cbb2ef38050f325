"""Configs that break one rule about experts: overrides, ranks, and what the problem must say."""

from __future__ import annotations

BROKEN_EXPERTS = {
    "parts of experts": (
        ["parallel.etp=2", "model.expert_hidden_size=24"],
        2,
        ["parallel.etp=2", "model.expert_hidden_size=24", "multiples of 8", "bf16", "allowed: 1, 3"],
    ),
    "8 bits to store and none to compute in": (
        ["model.expert_fp8_input_store=true"],
        1,
        ["model.expert_fp8_input_store=true", "model.expert_precision", "use fp8, fp8_power_of_two or mxfp8"],
    ),
    "wide products of wide experts": (
        ["model.expert_wide_into_activation=true"],
        1,
        ["model.expert_wide_into_activation=true", "but that is wide", "use fp8, fp8_power_of_two or mxfp8"],
    ),
    "8 bits to store what is kept wide": (
        [
            "model.expert_precision=fp8",
            "model.expert_hidden_size=128",
            "model.expert_wide_into_activation=true",
            "model.expert_fp8_input_store=true",
        ],
        1,
        ["model.expert_fp8_input_store=true", "model.expert_wide_into_activation=true", "use one of the two"],
    ),
    "parts of experts in 8 bits": (
        ["parallel.etp=2", "model.expert_hidden_size=384", "model.expert_precision=fp8"],
        2,
        ["parallel.etp=2", "multiples of 128", "kernels of model.expert_precision=fp8", "allowed: 1, 3"],
    ),
    "sizes of experts in 8 bits": (
        ["model.expert_hidden_size=288", "model.hidden_size=264", "model.expert_precision=mxfp8"],
        1,
        ["model.expert_precision=mxfp8", "not 288 and 264", "use 384 and 272", "model.expert_precision=wide"],
    ),
    "activation of experts in 8 bits": (
        ["model.expert_activation=geglu", "model.expert_precision=fp8"],
        1,
        ["model.expert_precision=fp8", "model.expert_activation=geglu", "use model.expert_precision=wide"],
    ),
    "parts of biases": (
        [
            "parallel.etp=3",
            "model.expert_hidden_size=96",
            "model.hidden_size=64",
            "model.expert_bias=true",
            "train.global_batch_size=6",
            "train.eval_sequences=6",
            "train.micro_batch_size=2",
        ],
        3,
        ["parallel.etp=3", "model.hidden_size=64", "model.expert_bias=true"],
    ),
}
