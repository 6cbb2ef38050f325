"""Which families there are."""

from __future__ import annotations

from moe.convert.families.base import Family, HfConfig
from moe.convert.families.deepseek_v3 import DEEPSEEK_V3
from moe.convert.families.dense import DENSE_FAMILIES
from moe.convert.families.glm4_moe import GLM4_MOE
from moe.convert.families.gpt_oss import GPT_OSS
from moe.convert.families.mixtral import MIXTRAL
from moe.convert.families.olmoe import OLMOE
from moe.convert.families.qwen3_moe import QWEN3_MOE
from moe.errors import InputError

# Folders of these types have the config and the tensors of a family under another name.
_ALIASES = {"kimi_k2": "deepseek_v3"}
FAMILIES = {family.name: family for family in (QWEN3_MOE, OLMOE, MIXTRAL, DEEPSEEK_V3, GLM4_MOE, GPT_OSS)}


def family_named(name: str) -> Family:
    """The family of that model_type.

    Raises:
        InputError: there is none.
    """
    if name not in FAMILIES:
        remedy = "; it is dense: moe convert upcycle takes it" if name in DENSE_FAMILIES else ""
        raise InputError(f"the family {name!r} cannot be converted; allowed: {', '.join(FAMILIES)}{remedy}")
    return FAMILIES[name]


def family_of_config(config: HfConfig) -> Family:
    """The family that a config.json names.

    Raises:
        InputError: none of ours, or the weights are quantised.
    """
    if config.get("quantization_config"):
        raise InputError(
            "config.json has a quantization_config: these weights are rounded. Give a folder in bf16 or fp32."
        )
    name = str(config.get("model_type"))
    return family_named(_ALIASES.get(name, name))
