"""Dense families whose models can be upcycled: each is a mixture-of-experts family with one expert."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe.convert.families.base import Family, HfConfig, need, refuse_unless
from moe.convert.families.mixtral import MIXTRAL
from moe.convert.families.qwen3_moe import QWEN3_MOE
from moe.errors import InputError


@dataclass(frozen=True)
class Experts:
    """What the copies of a feed-forward are cut into.

    Attributes:
        num_experts: E.
        top_k: K.
        hidden_size: F, of one expert.
    """

    num_experts: int
    top_k: int
    hidden_size: int


@dataclass(frozen=True)
class DenseFamily:
    """One dense architecture of transformers.

    Attributes:
        name: its model_type.
        becomes: the family of the upcycled model, which differs in the feed-forward only.
        moe_config: the config.json of the upcycled model.
        router: pattern of that family's router weights.
        expert: pattern of its experts' matrices; the groups are layer, expert and matrix.
        matrices: dense names of those matrices, in the order gate, up, down.
    """

    name: str
    becomes: Family
    moe_config: Callable[[HfConfig, Experts], dict[str, Any]]
    router: re.Pattern[str]
    expert: re.Pattern[str]
    matrices: Mapping[str, str]

    def tied_copies(self, config: HfConfig) -> dict[str, str]:
        """Some published folders repeat a tied embedding as the head."""
        tied = bool(config.get("tie_word_embeddings", False))
        return {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}


def dense_family_of(config: HfConfig) -> DenseFamily:
    """The dense family that a config.json names.

    Raises:
        InputError: none of ours, or the weights are quantised.
    """
    if config.get("quantization_config"):
        raise InputError(
            "config.json has a quantization_config: these weights are rounded. Give a folder in bf16 or fp32."
        )
    name = str(config.get("model_type"))
    if name not in DENSE_FAMILIES:
        raise InputError(f"the family {name!r} cannot be upcycled; allowed: {', '.join(DENSE_FAMILIES)}")
    return DENSE_FAMILIES[name]


def _mixtral_config(config: HfConfig, experts: Experts) -> dict[str, Any]:
    for name in ("attention_bias", "mlp_bias"):
        refuse_unless(config, name, False)
    kept = {name: value for name, value in config.items() if name not in _LLAMA_ONLY}
    if "rope_parameters" not in config:
        kept.setdefault("rope_theta", 10_000.0)  # configs older than Code Llama leave it out
    return {
        **kept,
        "model_type": MIXTRAL.name,
        "architectures": [MIXTRAL.architecture],
        "intermediate_size": experts.hidden_size,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "sliding_window": None,
    }


_LLAMA_ONLY = ("attention_bias", "mlp_bias", "pretraining_tp")


def _qwen3_moe_config(config: HfConfig, experts: Experts) -> dict[str, Any]:
    refuse_unless(config, "use_sliding_window", False)
    kept = {name: value for name, value in config.items() if name not in _QWEN3_ONLY}
    return {
        **kept,
        "model_type": QWEN3_MOE.name,
        "architectures": [QWEN3_MOE.architecture],
        "head_dim": need(config, "head_dim"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": experts.hidden_size,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "norm_topk_prob": True,
        "sliding_window": None,
    }


_QWEN3_ONLY = ("layer_types", "max_window_layers")

LLAMA = DenseFamily(
    "llama",
    MIXTRAL,
    _mixtral_config,
    router=re.compile(r"model\.layers\.\d+\.block_sparse_moe\.gate\.weight"),
    expert=re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight"),
    matrices={"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
)
QWEN3 = DenseFamily(
    "qwen3",
    QWEN3_MOE,
    _qwen3_moe_config,
    router=re.compile(r"model\.layers\.\d+\.mlp\.gate\.weight"),
    expert=re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(\d+)\.(\w+_proj)\.weight"),
    matrices={name: name for name in ("gate_proj", "up_proj", "down_proj")},
)
DENSE_FAMILIES = {family.name: family for family in (LLAMA, QWEN3)}
