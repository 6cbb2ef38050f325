"""Every class of transformers whose forward goes through the registry of experts, and tiny modules of it."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

DECORATED = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)

# What families call the same sizes; a config keeps those that it has.
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "moe_hidden_size": 16,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_mtp_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Of the constructor, beside the config.
ARGUMENTS = {"Ernie4_5_VLMoeMoeExperts": {"intermediate_size": 12}}


def registered_classes() -> dict[str, str]:
    """Name of the family's folder by class of experts, read from the sources: nothing is imported."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    found = {}
    for path in sorted(Path(spec.origin).parent.glob("models/*/modeling_*.py")):
        found |= dict.fromkeys(DECORATED.findall(path.read_text(encoding="utf-8")), path.parent.name)
    return found


def tiny_experts(family: str, class_name: str) -> torch.nn.Module:
    """Random experts in fp64 of the family's own activation, computed eagerly."""
    from transformers import PreTrainedConfig

    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    for config_class in vars(configuration).values():
        if not (isinstance(config_class, type) and issubclass(config_class, PreTrainedConfig)):
            continue
        config = config_class()
        config.allow_global_per_layer_attribute_access = True
        for name, value in TINY.items():
            if hasattr(config, name) and not isinstance(getattr(config, name), list):
                setattr(config, name, value)
        try:
            experts = getattr(modeling, class_name)(config, **ARGUMENTS.get(class_name, {}))
        except AttributeError:  # the config of another part, which has no experts
            continue
        config._experts_implementation = "eager"
        torch.manual_seed(0)
        for parameter in experts.parameters():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.3
        return experts
    raise AssertionError(f"no config of {family} has what {class_name} asks for")


def tiny_model(config_name: str, changes: dict[str, Any]) -> Any:
    """A random causal language model in fp64, computed eagerly."""
    import transformers

    config_class = getattr(transformers, config_name)
    known = {*dir(config_class), *getattr(config_class, "attribute_map", {})}
    config = config_class(**{name: value for name, value in TINY.items() if name in known} | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name else 0.0
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.2 + centre
    return model.double().eval()
