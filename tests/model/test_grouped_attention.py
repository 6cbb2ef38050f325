"""Grouped-query attention with everything that a config may add, against the equations, head by head."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_pool import RankPool
from tolerances import assert_close

from moe.config.schema import AttentionSection

SIZES: dict[str, Any] = {"num_heads": 6, "num_query_groups": 2, "head_dim": 8, "rope_base": 50.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one group a head": {"num_query_groups": 0},
    "norm in each head": {"qk_norm": "head"},
    "norm over all heads": {"qk_norm": "full"},
    "biases": {"qkv_bias": True, "output_bias": True},
    "a part turns": {"rotary_dim": 4},
    "yarn": {"yarn": {"factor": 8.0, "original_length": 16, "beta_fast": 2.0, "rotation_scale": 1.2}},
    "yarn, ends not rounded": {"yarn": {"factor": 4.0, "original_length": 40, "truncate": False}},
    "scaled logits": {"yarn": {"factor": 4.0, "original_length": 40, "softmax_scale": 1.5}},
    "window": {"sliding_window": 3},
    "sinks": {"sinks": True},
    "all": {
        "qk_norm": "full",
        "qkv_bias": True,
        "output_bias": True,
        "rotary_dim": 6,
        "sinks": True,
        "sliding_window": 4,
    },
}
EPS = 1e-5


def frequencies(sizes: AttentionSection, r: int) -> list[float]:
    """Radians a position, pair by pair; YaRN as section 3.2 of arXiv 2309.00071 has it."""
    yarn = sizes.yarn
    found = []
    for pair in range(r // 2):
        plain = sizes.rope_base ** (-2 * pair / r)

        def index_of(turns: float) -> float:
            return (
                r * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(sizes.rope_base))
            )

        low, high = index_of(yarn.beta_fast), index_of(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, r - 1)
        slowed = min(max((pair - low) / (high - low), 0.0), 1.0)
        found.append(plain if yarn.factor == 1 else plain * (1 - slowed) + plain / yarn.factor * slowed)
    return found


def turned(x_d: torch.Tensor, position: int, sizes: AttentionSection) -> torch.Tensor:
    """One head at one position: elements (i, i + r / 2) as complex numbers; the rest stays."""
    r = sizes.rotary_dim or sizes.head_dim
    angle = torch.tensor(frequencies(sizes, r), dtype=torch.float64) * position
    pairs = torch.complex(x_d[: r // 2], x_d[r // 2 : r]) * torch.polar(torch.ones_like(angle), angle)
    pairs = pairs * sizes.yarn.rotation_scale
    return torch.cat([pairs.real, pairs.imag, x_d[r:]])


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def oracle(x_SBD: torch.Tensor, w: dict[str, torch.Tensor], sizes: AttentionSection) -> torch.Tensor:
    """One sequence, one head, one position at a time, in float64."""
    H, G, d = sizes.num_heads, sizes.query_groups, sizes.head_dim
    S, B, _ = x_SBD.shape
    rows = w["linear_qkv.weight"].unflatten(0, (G, H // G + 2, d))
    out = []
    for b in range(B):
        qkv = torch.einsum("gnde,se->sgnd", rows, x_SBD[:, b])
        if sizes.qkv_bias:
            qkv = qkv + w["linear_qkv.bias"].unflatten(0, (G, H // G + 2, d))
        q, k, v = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
        if sizes.qk_norm == "head":
            q, k = rms_norm(q, w["q_layernorm.weight"]), rms_norm(k, w["k_layernorm.weight"])
        if sizes.qk_norm == "full":
            q = rms_norm(q.flatten(1), w["q_layernorm.weight"]).view_as(q)
            k = rms_norm(k.flatten(1), w["k_layernorm.weight"]).view_as(k)
        positions = []
        for s in range(S):
            seen = range(max(0, s + 1 - sizes.sliding_window) if sizes.sliding_window else 0, s + 1)
            heads = []
            for h in range(H):
                g = h // (H // G)
                scale = sizes.yarn.softmax_scale / math.sqrt(d)
                logits = [scale * turned(q[s, h], s, sizes) @ turned(k[t, g], t, sizes) for t in seen]
                if sizes.sinks:
                    logits.append(w["sinks.weight"][h])
                shares = torch.stack(logits).softmax(0)
                heads.append(sum(share * v[t, g] for share, t in zip(shares, seen, strict=False)))
            positions.append(torch.cat(heads) @ w["linear_proj.weight"].T)
        out.append(torch.stack(positions))
    y_SBD = torch.stack(out, dim=1)
    return y_SBD + w["linear_proj.bias"] if sizes.output_bias else y_SBD


def run_both(variant: dict[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(found, expected) of the output and of every gradient."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from moe.engine.without_cuda import without_cuda
    from moe.model.grouped_attention import GroupedQueryAttention

    torch.manual_seed(0)
    sizes = AttentionSection.model_validate({**SIZES, **variant})
    with without_cuda():
        parallel_state.initialize_model_parallel()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=12,
            num_attention_heads=6,
            kv_channels=8,
            layernorm_epsilon=EPS,
            use_cpu_initialization=True,
            perform_initialization=False,
            add_bias_linear=False,
            gradient_accumulation_fusion=False,
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        layer = GroupedQueryAttention(config, sizes, 0, groups)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        x_SBD = torch.randn(9, 2, 12, requires_grad=True)
        upstream_SBD = torch.randn(9, 2, 12)
        y_SBD, bias = layer(x_SBD)
        y_SBD = y_SBD if bias is None else y_SBD + bias
        y_SBD.backward(upstream_SBD)
        parallel_state.destroy_model_parallel()
    wide = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    wide_x_SBD = x_SBD.detach().double().requires_grad_()
    expected_SBD = oracle(wide_x_SBD, wide, sizes)
    expected_SBD.backward(upstream_SBD.double())
    pairs = {name: (p.grad, wide[name].grad) for name, p in layer.named_parameters()}
    pairs |= {"output": (y_SBD.detach(), expected_SBD.detach()), "x": (x_SBD.grad, wide_x_SBD.grad)}
    return pairs


@pytest.fixture(scope="module")
def pool(start_ranks: Any) -> RankPool:
    ranks: RankPool = start_ranks(1)
    return ranks


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_gradients_are_those_of_the_equations(pool: RankPool, variant: str) -> None:
    (pairs,) = pool.run(run_both, VARIANTS[variant])
    for name, (found, expected) in pairs.items():
        assert_close(name, found, expected.float(), dtype=torch.float32)


def test_pattern_leaves_each_nth_layer_without_a_window() -> None:
    from moe.model.grouped_attention import window_of

    sizes = AttentionSection(num_heads=1, sliding_window=7, full_attention_every=3)
    assert [window_of(sizes, layer) for layer in range(7)] == [7, 7, 0, 7, 7, 0, 7]
    every = AttentionSection(num_heads=1, sliding_window=7)
    assert [window_of(every, layer) for layer in range(3)] == [7, 7, 7]


def train_two_steps(overrides: tuple[str, ...]) -> list[tuple[float, float]]:
    """Loss and gradient norm of a small model on the ranks of the job."""
    from moe.config import load_config
    from moe.engine.megatron import MegatronEngine

    recipe = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    config = load_config(recipe, overrides, world_size=int(os.environ["WORLD_SIZE"]))
    engine = MegatronEngine(config)
    S, V = config.data.seq_length, config.model.vocab_size
    tokens_BS = torch.randint(V, (2, S + 1), generator=torch.Generator().manual_seed(0))
    batch = {
        "tokens_BS": tokens_BS[:, :-1].contiguous(),
        "labels_BS": tokens_BS[:, 1:].contiguous(),
        "loss_mask_BS": torch.ones(2, S),
        "position_ids_BS": torch.arange(S).expand(2, S),
    }
    try:
        results = [engine.train_step(iter([batch]), lr=1e-2) for _ in range(2)]
    finally:
        engine.close()
    return [(result.loss, result.grad_norm) for result in results]


TINY = (
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.ffn_hidden_size=24",
    "model.vocab_size=64",
    "model.num_experts=4",
    "model.expert_hidden_size=8",
    "model.shared_expert_hidden_size=8",
    "model.attention.num_heads=4",
    "model.attention.num_query_groups=2",
    "model.attention.head_dim=6",
    "data.seq_length=12",
    "train.global_batch_size=2",
    "train.micro_batch_size=2",
    "train.eval_sequences=2",
)
EVERYTHING = (
    "model.attention.qkv_bias=true",
    "model.attention.output_bias=true",
    "model.attention.sinks=true",
    "model.attention.sliding_window=5",
    "model.attention.full_attention_every=2",
    "model.attention.rotary_dim=4",
)


@pytest.mark.parametrize("norm", ["head", "full"])
def test_two_tensor_parallel_ranks_train_like_one(start_ranks: Any, norm: str) -> None:
    ranks: RankPool = start_ranks(2, init_process_group=False)
    overrides = (*TINY, *EVERYTHING, f"model.attention.qk_norm={norm}")
    (one,) = ranks.run(train_two_steps, overrides, num_ranks=1)
    two, again = ranks.run(train_two_steps, (*overrides, "parallel.tp=2"), num_ranks=2)
    assert two == again
    for (loss, grad_norm), (expected_loss, expected_norm) in zip(two, one, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert grad_norm == pytest.approx(expected_norm, rel=1e-4)
