"""Every class of experts in transformers' registry: output and gradients equal eager, or refused by name."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from gradients import gradients
from hf_registry import registered_classes, tiny_experts, tiny_model
from tolerances import assert_as_good_as_plain, assert_close
from torch import Tensor

from moe.errors import InputError
from moe.transformers_backend import register_with_transformers, switch_experts

CLASSES = registered_classes()

# What these need beyond SwiGLU, as the error must say. A class that is not here must equal eager.
REFUSED = {
    "BeamExperts": "its own gate, BeamExperts._apply_gate",
    "DeepseekV4Experts": "its own gate, DeepseekV4Experts._apply_gate",
    "DiffusionGemmaTextExperts": "the activation GELUTanh",
    "Gemma4TextExperts": "the activation GELUTanh",
    "Glm5NextTextExperts": "its own gate, Glm5NextTextExperts._apply_gate",
    "HYV4Experts": "its own gate, HYV4Experts._apply_gate",
    "Inkling2Experts": "its own gate, Inkling2Experts._apply_gate",
    "MiniMaxM3VLExperts": "its own gate, MiniMaxM3VLExperts._apply_gate",
    "MuseSparkExperts": "a norm after each expert",
    "NemotronHExperts": "experts without a gate",
    # Its products are in fp32 whatever the dtype of its weights.
    "OpenAIPrivacyFilterExperts": "its own gate, OpenAIPrivacyFilterExperts._apply_gate",
}
SUPPORTED = [name for name in CLASSES if name not in REFUSED]

# Tokens of two pairs; experts 1 and 4 of the six have none, and 3 is a hot one.
IDS_TK = torch.tensor([[0, 3], [3, 2], [5, 3], [3, 0], [2, 3], [3, 5], [0, 2]])

# Whole models, which hand their experts what their own router says: config class, and what it asks for.
MODELS: dict[str, dict[str, Any]] = {
    "AfmoeConfig": {},
    "AriaTextConfig": {},
    "AXK1Config": {},
    "Cohere2MoeConfig": {},
    "DeepseekV2Config": {},
    "DeepseekV3Config": {},
    "DeepseekV32Config": {},
    "Ernie4_5_MoeConfig": {},
    "ExaoneMoeConfig": {},
    "FlexOlmoConfig": {},
    "Glm4MoeConfig": {},
    "Glm4MoeLiteConfig": {},
    "GlmMoeDsaConfig": {},
    "GraniteMoeConfig": {},
    "GraniteMoeHybridConfig": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "GraniteMoeSharedConfig": {},
    "HYV3Config": {},
    "HunYuanMoEV1Config": {"head_dim": 8},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "MellumConfig": {},
    "MiniMaxConfig": {},
    "MiniMaxM2Config": {},
    "MixtralConfig": {},
    "OlmoeConfig": {},
    "PhimoeConfig": {},
    "Qwen2MoeConfig": {},
    "Qwen3MoeConfig": {},
    "Qwen3NextConfig": {},
    "SolarOpenConfig": {},
    "ZayaConfig": {"num_experts_per_tok": 1},
}
# The others take minutes together; test_experts_implementation.py has the converted families in any case.
QUICK = ("GraniteMoeConfig", "MiniMaxM2Config", "Qwen2MoeConfig", "SolarOpenConfig")


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register_with_transformers()


def in_dtype(experts: torch.nn.Module, dtype: torch.dtype) -> tuple[Any, Tensor, Tensor]:
    """The experts and their inputs, with gradients; combine weights stay in fp32 at least."""
    generator = torch.Generator().manual_seed(1)
    down = experts.down_proj
    width = down.shape[2 if experts.is_transposed else 1]
    x_TD = torch.randn(len(IDS_TK), width, generator=generator)
    weights_TK = torch.rand(IDS_TK.shape, generator=generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        copy.deepcopy(experts).bfloat16().to(dtype),  # one set of numbers for all dtypes
        x_TD.bfloat16().to(dtype).requires_grad_(),
        weights_TK.to(wide).requires_grad_(),
    )


def run(
    experts: torch.nn.Module, implementation: str, dtype: torch.dtype, ids_TK: Tensor = IDS_TK
) -> dict[str, Tensor]:
    """Output and every gradient."""
    module, x_TD, weights_TK = in_dtype(experts, dtype)
    module.config._experts_implementation = implementation
    y_TD = module(x_TD, ids_TK, weights_TK)
    cotangent_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(2))
    leaves = {"x": x_TD, "weights": weights_TK, **dict(module.named_parameters())}
    return {"y": y_TD, **gradients(y_TD, cotangent_TD.bfloat16(), **leaves)}


def test_the_registry_is_as_large_as_it_was() -> None:
    """A new version of transformers: look at what it added, then change this number."""
    assert len(CLASSES) == 65
    assert CLASSES.keys() >= REFUSED.keys()


@pytest.mark.parametrize("class_name", SUPPORTED)
def test_output_and_every_gradient_equal_eager(class_name: str) -> None:
    experts = tiny_experts(CLASSES[class_name], class_name)
    exact = run(experts, "eager", torch.float64)
    for name, tensor in run(experts, "moe", torch.float64).items():
        assert_close(name, tensor, exact[name])
    for dtype in (torch.float32, torch.bfloat16):
        plain = run(experts, "eager", dtype)
        for name, tensor in run(experts, "moe", dtype).items():
            assert tensor.dtype == plain[name].dtype
            assert_as_good_as_plain(name, tensor, plain[name], exact[name], dtype=dtype)


@pytest.mark.parametrize("class_name", REFUSED)
def test_other_experts_are_refused_by_name(class_name: str) -> None:
    experts = tiny_experts(CLASSES[class_name], class_name).float()
    experts.config._experts_implementation = "moe"
    says = f'{class_name} cannot use experts_implementation="moe": it needs {REFUSED[class_name]}, and our'
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        experts(torch.zeros(2, 32), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    assert str(caught.value).endswith('Use experts_implementation="grouped_mm" or "eager"')


@pytest.mark.parametrize(
    "config_name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MODELS],
)
def test_whole_models_equal_eager(config_name: str) -> None:
    model = tiny_model(config_name, MODELS[config_name])
    tokens_BS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(3))
    found = {}
    for implementation in ("eager", "moe"):
        if implementation == "moe":
            assert switch_experts(model) > 0
        logits_BSV = model(tokens_BS).logits
        model.zero_grad()
        logits_BSV.square().mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[implementation] = {"logits": logits_BSV, **grads}
    assert found["moe"].keys() == found["eager"].keys()
    for name, tensor in found["moe"].items():
        assert_close(name, tensor, found["eager"][name])
    with torch.no_grad():
        model.bfloat16()(tokens_BS)  # no router hands over a dtype that our kernels refuse


@pytest.mark.parametrize(
    ("implementation", "dtype"), [("eager", torch.float64), ("grouped_mm", torch.float32)]
)
def test_ids_of_other_ranks_add_nothing(implementation: str, dtype: torch.dtype) -> None:
    """Under transformers' expert parallelism the id past the last expert stands for all other ranks'."""
    experts = tiny_experts("mixtral", "MixtralExperts")
    experts.num_experts = 3
    experts._is_expert_parallel = True
    for parameter in experts.parameters():
        parameter.data = parameter.data[:3]
    local_TK = IDS_TK.clamp(max=3)
    expected = run(experts, implementation, dtype, local_TK)
    actual = run(experts, "moe", dtype, local_TK)
    for name, tensor in actual.items():
        assert_close(name, tensor, expected[name])
    assert not actual["weights"][local_TK == 3].any()
    assert actual["weights"][local_TK < 3].all()
