"""Small random models of transformers, two sizes a family, in folders as `save_pretrained` writes them.

Size `even` can be split over two ranks along every axis; size `odd` can be split along none.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

EVEN: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ODD: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}

# Class of the config, and what is added for each size.
FAMILIES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "even": {
                **EVEN,
                "head_dim": 10,
                "intermediate_size": 36,
                "moe_intermediate_size": 12,
                "num_experts": 6,
                "num_experts_per_tok": 2,
                "norm_topk_prob": True,
                "mlp_only_layers": [0],
            },
            "odd": {
                **ODD,
                "head_dim": 14,
                "intermediate_size": 18,
                "moe_intermediate_size": 8,
                "num_experts": 5,
                "num_experts_per_tok": 3,
                "attention_bias": True,
                "tie_word_embeddings": True,
            },
        },
    ),
    "olmoe": (
        "OlmoeConfig",
        {
            "even": {**EVEN, "intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 2},
            "odd": {
                **ODD,
                "hidden_size": 36,
                "intermediate_size": 8,
                "num_experts": 5,
                "num_experts_per_tok": 3,
                "norm_topk_prob": True,
                "attention_bias": True,
            },
        },
    ),
    "mixtral": (
        "MixtralConfig",
        {
            "even": {**EVEN, "intermediate_size": 12, "num_local_experts": 6, "sliding_window": 5},
            "odd": {**ODD, "head_dim": 6, "intermediate_size": 8, "num_local_experts": 5},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "even": {
                **EVEN,
                "num_key_value_heads": 4,
                "intermediate_size": 36,
                "moe_intermediate_size": 12,
                "n_routed_experts": 8,
                "num_experts_per_tok": 3,
                "n_group": 4,
                "topk_group": 2,
                "first_k_dense_replace": 1,
                "q_lora_rank": 14,
                "kv_lora_rank": 10,
                "qk_nope_head_dim": 6,
                "qk_rope_head_dim": 8,
                "v_head_dim": 7,
                "num_mtp_layers": 0,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10_000.0,
                    "factor": 40.0,
                    "original_max_position_embeddings": 16,
                    "beta_fast": 8.0,
                    "beta_slow": 1.0,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                },
            },
            "odd": {
                **ODD,
                "num_key_value_heads": 3,
                "intermediate_size": 18,
                "moe_intermediate_size": 8,
                "n_routed_experts": 5,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "n_shared_experts": 2,
                "first_k_dense_replace": 2,
                "q_lora_rank": None,
                "kv_lora_rank": 9,
                "qk_nope_head_dim": 5,
                "qk_rope_head_dim": 4,
                "v_head_dim": 3,
                "num_mtp_layers": 0,
                "norm_topk_prob": False,
            },
        },
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "even": {
                **EVEN,
                "head_dim": 12,
                "intermediate_size": 36,
                "moe_intermediate_size": 12,
                "n_routed_experts": 6,
                "num_experts_per_tok": 2,
                "use_qk_norm": True,
                "attention_bias": True,
                "routed_scaling_factor": 1.7,
                "num_mtp_layers": 0,
            },
            "odd": {
                **ODD,
                "head_dim": 16,
                "intermediate_size": 18,
                "moe_intermediate_size": 8,
                "n_routed_experts": 5,
                "num_experts_per_tok": 2,
                "first_k_dense_replace": 0,
                "partial_rotary_factor": 0.25,
                "num_mtp_layers": 0,
            },
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "even": {
                **EVEN,
                "head_dim": 12,
                "intermediate_size": 16,
                "num_local_experts": 6,
                "num_experts_per_tok": 2,
                "sliding_window": 5,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 150_000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                    "beta_fast": 8.0,
                    "beta_slow": 1.0,
                    "truncate": False,
                },
            },
            "odd": {
                **ODD,
                "head_dim": 6,
                "intermediate_size": 8,
                "num_local_experts": 5,
                "num_experts_per_tok": 3,
                "sliding_window": 3,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
}


def make_model(family: str, size: str, seed: int, **changes: Any) -> Any:
    """A random model in fp32: matrices, norms, biases and buffers."""
    config_class, sizes = FAMILIES[family]
    return random_model(config_class, sizes[size] | changes, seed)


def random_model(config_class: str, sizes: dict[str, Any], seed: int) -> Any:
    """The same of any class of configs."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = getattr(transformers, config_class)(**sizes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name:
            centre = 1.0 if "norm" in name else 0.0
            tensor.data = torch.randn(tensor.shape) * 0.3 + centre
    return model.eval()


def save_model(model: Any, folder: Path) -> Path:
    """Its folder."""
    model.save_pretrained(folder)
    return folder


def add_predictions(model: Any, folder: Path, *, with_copies: bool) -> Any:
    """Add a layer of multi-token prediction to a saved model, as published folders have it; returns it."""
    from transformers.modeling_layers import MtpModel

    ahead = MtpModel(model, 1)
    own = {f"layers.0.{name}": p for name, p in ahead.layers[0].named_parameters()}
    own |= {f"layers.0.{name}": b for name, b in ahead.layers[0].named_buffers()}
    torch.manual_seed(len(own))
    number, tensors = model.config.num_hidden_layers, tensors_of(folder)
    for name, tensor in own.items():
        tensor.data = torch.randn(tensor.shape) * 0.3 + (1.0 if "norm" in name else 0.0)
        theirs = name.replace("layers.0.", f"model.layers.{number}.").replace("mtp_block.", "")
        theirs = theirs.replace("post_norm", "shared_head.norm")
        tensors |= _apart(theirs, tensor.data)
    if with_copies:
        tensors[f"model.layers.{number}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"model.layers.{number}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return ahead


def _apart(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Experts, which transformers keeps in one tensor, one by one."""
    base, _, kind = name.rpartition(".")
    if kind == "gate_up_proj":
        gates, ups = tensor.chunk(2, dim=1)
        return {
            f"{base}.{e}.{part}_proj.weight": stack[e]
            for part, stack in (("gate", gates), ("up", ups))
            for e in range(len(stack))
        }
    if kind == "down_proj":
        return {f"{base}.{e}.down_proj.weight": matrix for e, matrix in enumerate(tensor)}
    return {name: tensor}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor on disk."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names that only one has, or whose dtype, shape or bytes differ."""
    differing = sorted(one.keys() ^ other.keys())
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            differing.append(name)
    return differing
