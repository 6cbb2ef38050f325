"""What the families share: the reading of configs, and the mappings that most tables begin with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from moe.config.schema import AttentionSection, ModelSection, YarnSection
from moe.convert.mapping import Direct, FusedQkv, GateUp, PerExpert, TensorMapping, Zeros
from moe.errors import InputError

HfConfig = Mapping[str, Any]

LAYER, OUR_LAYER = "model.layers.*", "decoder.layers.*"
OUR_PREDICTION = "mtp.layers.*"
OUR_EXPERTS, OUR_ROUTER = f"{OUR_LAYER}.mlp.layer.experts", f"{OUR_LAYER}.mlp.layer.router"


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
        name: its model_type.
        architecture: the class that config.json names.
        read_config: config.json to our model; for `model_of`, which tells what is wrong.
        write_config: our model to the keys of config.json; raises InputError for what it cannot say.
        table: mappings of every tensor.
        copies: tensors that a folder may hold beside those of the table, each equal to another of them.
    """

    name: str
    architecture: str
    read_config: Callable[[HfConfig], ModelSection]
    write_config: Callable[[ModelSection], dict[str, Any]]
    table: Callable[[ModelSection], tuple[TensorMapping, ...]]
    copies: Callable[[ModelSection], dict[str, str]] = lambda _: {}

    def model_of(self, config: HfConfig) -> ModelSection:
        """Our model of a config.json.

        Raises:
            InputError: it lacks a value, has one of a wrong kind, or one that we cannot compute.
        """
        try:
            return self.read_config(config)
        except (ValidationError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(f"config.json does not describe a {self.name} model: {error}") from error


def trunk() -> tuple[TensorMapping, ...]:
    """Embedding, head and the last norm, which every family names alike."""
    return (
        Direct("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        Direct("output_layer.weight", "lm_head.weight"),
        Direct("decoder.final_layernorm.weight", "model.norm.weight"),
    )


def layer_norms() -> tuple[Direct, ...]:
    """The two norms of a layer, too."""
    return (
        Direct(f"{OUR_LAYER}.input_layernorm.weight", f"{LAYER}.input_layernorm.weight"),
        Direct(f"{OUR_LAYER}.pre_mlp_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight"),
    )


def grouped_attention(model: ModelSection) -> tuple[Direct | FusedQkv, ...]:
    """Grouped-query attention, with what a config may add to it."""
    ours, theirs = f"{OUR_LAYER}.self_attention", f"{LAYER}.self_attn"
    attention = model.attention
    fused = [
        FusedQkv(
            f"{ours}.linear_qkv.{kind}",
            (f"{theirs}.q_proj.{kind}", f"{theirs}.k_proj.{kind}", f"{theirs}.v_proj.{kind}"),
            num_heads=attention.num_heads,
            num_groups=attention.query_groups,
            head_dim=attention.head_dim,
        )
        for kind in ("weight", "bias")
    ]
    return (
        *fused,
        *(Direct(f"{ours}.linear_proj.{kind}", f"{theirs}.o_proj.{kind}") for kind in ("weight", "bias")),
        Direct(f"{ours}.q_layernorm.weight", f"{theirs}.q_norm.weight"),
        Direct(f"{ours}.k_layernorm.weight", f"{theirs}.k_norm.weight"),
    )


def predictions(
    model: ModelSection, layer: tuple[Direct | GateUp | FusedQkv | PerExpert, ...]
) -> tuple[TensorMapping, ...]:
    """Multi-token prediction as DeepSeek-V3 numbers it: layers after the last, with some more tensors each.

    Args:
        model: whose layers are counted.
        layer: the mappings of one of its layers.
    """
    own = {
        "enorm": "enorm",
        "hnorm": "hnorm",
        "eh_proj": "eh_proj",
        "final_layernorm": "shared_head.norm",
    }
    names = [(f"{OUR_PREDICTION}.{our}.weight", f"{LAYER}.{their}.weight") for our, their in own.items()]
    block = f"{OUR_PREDICTION}.transformer_layer"
    return (
        *(Direct(ours, theirs, first_layer=model.num_layers) for ours, theirs in names),
        *(
            replace(entry, ours=entry.ours.replace(OUR_LAYER, block), first_layer=model.num_layers)
            for entry in layer
        ),
    )


def prediction_copies(model: ModelSection) -> dict[str, str]:
    """Published folders repeat the embedding and the head in each prediction layer."""
    head = "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
    copies = {}
    for number in range(model.num_layers, model.num_layers + model.mtp_layers):
        copies[f"model.layers.{number}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{number}.shared_head.head.weight"] = head
    return copies


def dense_feed_forward(ours: str, theirs: str) -> tuple[Direct | GateUp, ...]:
    """A SwiGLU that all tokens pass: a dense layer's or a shared expert."""
    return (
        GateUp(f"{ours}.linear_fc1.weight", (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")),
        Direct(f"{ours}.linear_fc2.weight", f"{theirs}.down_proj.weight"),
    )


def routed_experts(
    theirs: str, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Direct | PerExpert, ...]:
    """Router weight and experts below a name, each expert's matrices apart."""
    expert = f"{theirs}.experts.#"
    return (
        Direct(f"{OUR_ROUTER}.weight_ED", f"{theirs}.gate.weight"),
        PerExpert(f"{OUR_EXPERTS}.w_gate_up_eGD", (f"{expert}.{gate}.weight", f"{expert}.{up}.weight")),
        PerExpert(f"{OUR_EXPERTS}.w_down_eDF", (f"{expert}.{down}.weight",)),
    )


def softmax_experts(theirs: str, **names: str) -> tuple[TensorMapping, ...]:
    """The same of a family without a bias for the choice of experts."""
    return (*routed_experts(theirs, **names), Zeros(f"{OUR_ROUTER}.bias_E"))


def grouped_section(config: HfConfig, **more: Any) -> AttentionSection:
    """Grouped-query attention of a config with the names that Llama began; `more` overrides."""
    heads = need(config, "num_attention_heads")
    values = {
        "num_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim(config),
        "rope_base": rope_parameters(config)["rope_theta"],
        "yarn": yarn_section(config),
        **more,
    }
    return AttentionSection.model_validate(values)


def grouped_config(attention: AttentionSection) -> dict[str, Any]:
    """The keys that `grouped_section` reads."""
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.query_groups,
        "head_dim": attention.head_dim,
        "rope_parameters": rope_config(attention),
    }


def common_section(config: HfConfig) -> dict[str, Any]:
    """Keys of ModelSection that all families name alike."""
    refuse_unless(config, "hidden_act", "silu")
    refuse_unless(config, "attention_dropout", 0.0)
    return {
        "num_layers": need(config, "num_hidden_layers"),
        "hidden_size": need(config, "hidden_size"),
        "vocab_size": need(config, "vocab_size"),
        "top_k": need(config, "num_experts_per_tok"),
        "norm_eps": need(config, "rms_norm_eps"),
        "init_std": config.get("initializer_range") or 0.02,  # the default of every class of transformers
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def common_config(model: ModelSection) -> dict[str, Any]:
    """The keys that `common_section` reads."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "hidden_act": "silu",
        "vocab_size": model.vocab_size,
        "num_experts_per_tok": model.top_k,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }


def rope_parameters(config: HfConfig) -> dict[str, Any]:
    """The rotary settings, from the place where transformers 5 writes them or from that of version 4."""
    found = config.get("rope_parameters")
    if found is None:
        scaling = dict(config.get("rope_scaling") or {})
        scaling["rope_type"] = scaling.get("rope_type", scaling.pop("type", "default"))
        found = {"rope_theta": need(config, "rope_theta"), **scaling}
    parameters = {"rope_type": "default", **found}
    if "partial_rotary_factor" in config:
        parameters.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if parameters["rope_type"] not in ("default", "yarn"):
        raise InputError(
            f"config.json: rope_type={parameters['rope_type']!r} cannot be computed; allowed: default, yarn"
        )
    return parameters


def yarn_section(config: HfConfig, *, scales_logits: bool = False) -> YarnSection:
    """YaRN's settings; off where the config has none.

    Args:
        config: of the model.
        scales_logits: whether the family applies mscale_all_dim to the logits, as DeepSeek-V3 does.
    """
    rope = rope_parameters(config)
    if rope["rope_type"] == "default":
        return YarnSection()
    factor = need(rope, "factor")

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    all_dim = rope.get("mscale_all_dim") or 0
    rotation = rope.get("attention_factor")
    if rotation is None:
        both = rope.get("mscale") and all_dim
        rotation = mscale(rope["mscale"]) / mscale(all_dim) if both else mscale(1)
    return YarnSection(
        factor=factor,
        original_length=need(rope, "original_max_position_embeddings"),
        beta_fast=rope.get("beta_fast") or 32.0,  # the paper's, as transformers fills them in
        beta_slow=rope.get("beta_slow") or 1.0,
        truncate=rope.get("truncate", True),
        rotation_scale=rotation,
        softmax_scale=mscale(all_dim) ** 2 if scales_logits and all_dim else 1.0,
    )


def rope_config(attention: AttentionSection) -> dict[str, Any]:
    """The keys that `rope_parameters` and `yarn_section` read."""
    yarn = attention.yarn
    if yarn.factor == 1:
        return {"rope_type": "default", "rope_theta": attention.rope_base}
    if yarn.softmax_scale != 1.0:
        raise InputError(
            f"model.attention.yarn.softmax_scale={yarn.softmax_scale:g} has no word in this family's config"
        )
    return {
        "rope_type": "yarn",
        "rope_theta": attention.rope_base,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "truncate": yarn.truncate,
        "attention_factor": yarn.rotation_scale,
    }


def head_dim(config: HfConfig) -> int:
    """Size of a head: its own key, or the share of the hidden size."""
    return int(config.get("head_dim") or need(config, "hidden_size") // need(config, "num_attention_heads"))


def need(config: HfConfig, *names: str) -> Any:
    """The value of the first of these keys that is there.

    Raises:
        InputError: none is.
    """
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise InputError(f"config.json: {' or '.join(names)} is missing")


def refuse_unless(config: HfConfig, name: str, *allowed: object) -> None:
    """Raise InputError if a key is there with a value that we cannot compute."""
    if name in config and config[name] not in allowed:
        choices = ", ".join(repr(value) for value in allowed)
        raise InputError(f"config.json: {name}={config[name]!r} cannot be computed; allowed: {choices}")
