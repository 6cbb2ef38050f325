"""In which keys two models compute differently."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe.config.schema import ModelSection, Section

# Keys that say how a model is trained and not what it computes; a Hugging Face config has other words for
# them or none.
_TRAINING_KEYS = (
    "init_std",
    "mtp_loss_coeff",
    "router.aux_loss",
    "router.aux_loss_coeff",
    "router.z_loss_coeff",
    "router.bias_update_rate",
    "router.rounding",
    "router.tile_rows",
    "router.jitter",
    "router.capacity_factor",
    "expert_precision",
    "expert_fp8_input_store",
    "expert_wide_into_activation",
)
# Keys that only the other kind of attention reads.
_UNREAD_KEYS = {
    "gqa": ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    "mla": ("num_query_groups", "head_dim", "rotary_dim"),
}


def differences(one: ModelSection, other: ModelSection) -> dict[str, tuple[Any, Any]]:
    """Keys in which two models compute differently, with both values."""
    left, right = _what_computes(one), _what_computes(other)
    keys = sorted(left.keys() | right.keys())
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def _what_computes(model: ModelSection) -> dict[str, Any]:
    """The keys that change what a model computes; several ways to write the same become one."""
    attention, router = model.attention, model.router
    values = dict(leaves(model))
    values["attention.num_query_groups"] = attention.query_groups
    values["attention.rotary_dim"] = attention.rotary_dim or attention.head_dim
    if router.score == "softmax" and not router.score_before_topk:
        # The softmax over the chosen is the share of each in the softmax over all.
        values |= {"router.score_before_topk": True, "router.renormalize": True}
    unread = {*_TRAINING_KEYS, *(f"attention.{key}" for key in _UNREAD_KEYS[attention.kind])}
    if model.num_dense_layers == 0:
        unread.add("ffn_hidden_size")
    if attention.yarn.factor == 1:
        unread |= {key for key in values if key.startswith("attention.yarn.")}
    return {key: value for key, value in values.items() if key not in unread}


def leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a section; a list is one value."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
