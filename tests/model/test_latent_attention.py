"""Latent attention against the equations, head by head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ranks_pool import RankPool
from tolerances import assert_close

from moe.config.schema import AttentionSection

SIZES = {
    "kind": "mla",
    "num_heads": 3,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "rope_base": 100.0,
}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x_Sr: torch.Tensor, base: float) -> torch.Tensor:
    """Each neighbouring pair is a complex number, turned by position * base**(-2i/r)."""
    S, r = x_Sr.shape
    angle = torch.outer(torch.arange(S).double(), base ** (-torch.arange(0, r, 2).double() / r))
    turned = torch.view_as_complex(x_Sr.double().unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.view_as_real(turned).flatten(-2)


def oracle(x_SBD: torch.Tensor, w: dict[str, torch.Tensor], sizes: AttentionSection) -> torch.Tensor:
    """Section 2.1 of arXiv 2405.04434, one sequence and one head at a time, in float64."""
    n, r, v = sizes.qk_nope_head_dim, sizes.qk_rope_head_dim, sizes.v_head_dim
    w = {name: weight.double() for name, weight in w.items()}
    S, B, D = x_SBD.shape
    out = torch.zeros(S, B, D, dtype=torch.float64)
    for b in range(B):
        x = x_SBD[:, b].double()
        q_in = x
        if sizes.q_lora_rank:
            q_in = rms_norm(x @ w["linear_q_down.weight"].T, w["q_layernorm.weight"], 1e-5)
        down = x @ w["linear_kv_down.weight"].T
        compressed = rms_norm(down[:, : sizes.kv_lora_rank], w["kv_layernorm.weight"], 1e-5)
        k_rope = turn(down[:, sizes.kv_lora_rank :], sizes.rope_base)
        heads = []
        for h in range(sizes.num_heads):
            q = q_in @ w["linear_q_up.weight"][h * (n + r) : (h + 1) * (n + r)].T
            kv = compressed @ w["linear_kv_up.weight"][h * (n + v) : (h + 1) * (n + v)].T
            logits = q[:, :n] @ kv[:, :n].T + turn(q[:, n:], sizes.rope_base) @ k_rope.T
            logits = logits / math.sqrt(n + r) + torch.full((S, S), -torch.inf).triu(1)
            heads.append(logits.softmax(-1) @ kv[:, n:])
        out[:, b] = torch.cat(heads, -1) @ w["linear_proj.weight"].T
    return out


def forward_both(q_lora_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from moe.engine.without_cuda import without_cuda
    from moe.model.latent_attention import LatentAttention

    assert dist.get_world_size() == 1
    torch.manual_seed(0)
    sizes = AttentionSection.model_validate({**SIZES, "q_lora_rank": q_lora_rank})
    with without_cuda():
        parallel_state.initialize_model_parallel()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=16,
            num_attention_heads=3,
            kv_channels=8,
            use_cpu_initialization=True,
            perform_initialization=False,
            add_bias_linear=False,
            gradient_accumulation_fusion=False,
        )
        layer = LatentAttention(config, sizes, ProcessGroupCollection.use_mpu_process_groups())
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        x_SBD = torch.randn(7, 2, 16)
        found, _ = layer(x_SBD)
        parallel_state.destroy_model_parallel()
    weights = {name: weight.detach() for name, weight in layer.named_parameters()}
    return found.detach(), oracle(x_SBD, weights, sizes)


@pytest.mark.parametrize("q_lora_rank", [0, 9])
def test_output_is_that_of_the_equations(start_ranks: Any, q_lora_rank: int) -> None:
    pool: RankPool = start_ranks(1)
    ((found, expected),) = pool.run(forward_both, q_lora_rank)
    assert_close("output", found, expected.float(), dtype=torch.float32)
