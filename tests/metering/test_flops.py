"""Closed forms against published and exactly computed totals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe.metering.flops import (
    GqaShape,
    MlaShape,
    ModelShape,
    flops_per_token,
    params_active,
    params_active_no_embedding,
    params_total,
    router_bias_numbers,
)


def mla(num_heads: int, q_lora_rank: int = 1536) -> MlaShape:
    return MlaShape(
        num_heads=num_heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )


DEEPSEEK_V3 = ModelShape(
    num_layers=61,
    num_dense_layers=3,
    hidden_size=7168,
    vocab_size=129280,
    tied_embeddings=False,
    ffn_hidden_size=18432,
    num_experts=256,
    top_k=8,
    expert_hidden_size=2048,
    shared_expert_hidden_size=2048,
    attention=mla(128),
)
KIMI_K2 = replace(DEEPSEEK_V3, num_dense_layers=1, vocab_size=163840, num_experts=384, attention=mla(64))
QWEN3_30B = ModelShape(
    num_layers=48,
    num_dense_layers=0,
    hidden_size=2048,
    vocab_size=151936,
    tied_embeddings=False,
    ffn_hidden_size=6144,
    num_experts=128,
    top_k=8,
    expert_hidden_size=768,
    shared_expert_hidden_size=0,
    attention=GqaShape(num_heads=32, num_query_groups=4, head_dim=128, qk_norm="head"),
)
QWEN3_235B = replace(
    QWEN3_30B,
    num_layers=94,
    hidden_size=4096,
    expert_hidden_size=1536,
    attention=GqaShape(num_heads=64, num_query_groups=4, head_dim=128, qk_norm="head"),
)
MIXTRAL_8X7B = ModelShape(
    num_layers=32,
    num_dense_layers=0,
    hidden_size=4096,
    vocab_size=32000,
    tied_embeddings=False,
    ffn_hidden_size=14336,
    num_experts=8,
    top_k=2,
    expert_hidden_size=14336,
    shared_expert_hidden_size=0,
    attention=GqaShape(num_heads=32, num_query_groups=8, head_dim=128),
)


@pytest.mark.parametrize(
    ("shape", "published"),
    [(QWEN3_30B, 30_532_122_624), (QWEN3_235B, 235_093_634_560), (MIXTRAL_8X7B, 46_702_792_704)],
)
def test_params_total_is_exact(shape: ModelShape, published: int) -> None:
    assert params_total(shape) == published


@pytest.mark.parametrize(
    ("shape", "published"), [(DEEPSEEK_V3, 671_026_419_200), (KIMI_K2, 1_026_408_232_448)]
)
def test_params_total_is_exact_with_router_biases(shape: ModelShape, published: int) -> None:
    assert params_total(shape) + router_bias_numbers(shape) == published


@pytest.mark.parametrize(
    ("shape", "active", "without_embedding"),
    [
        (DEEPSEEK_V3, 37.552e9, 36.626e9),
        (KIMI_K2, 32.862e9, 31.687e9),
        (QWEN3_235B, 22.191e9, 21.568e9),
        (MIXTRAL_8X7B, 12.880e9, 12.749e9),
    ],
)
def test_params_active(shape: ModelShape, active: float, without_embedding: float) -> None:
    # Rounded to the last digit that the source gives.
    assert params_active(shape) == pytest.approx(active, abs=0.6e6)
    assert params_active_no_embedding(shape) == pytest.approx(without_embedding, abs=0.6e6)


@pytest.mark.parametrize(
    ("shape", "published_gigaflops"),
    [(DEEPSEEK_V3, 249.71), (QWEN3_235B, 148.038), (QWEN3_30B, 23.0070), (KIMI_K2, 204.6)],
)
def test_flops_per_token_within_a_thousandth_of_published(
    shape: ModelShape, published_gigaflops: float
) -> None:
    # Leaving the router in would miss Qwen3-30B by 0.33 %.
    assert flops_per_token(shape, 4096) / 1e9 == pytest.approx(published_gigaflops, rel=1e-3)


def test_flops_follow_the_convention_term_by_term() -> None:
    attention_weights = 4096 * (32 + 8 + 8 + 32) * 128
    two_experts = 2 * 3 * 4096 * 14336
    matmul = 32 * (attention_weights + two_experts) + 32000 * 4096
    attention = 6 * 32 * (4096 // 2) * 32 * (128 + 128)
    assert flops_per_token(MIXTRAL_8X7B, 4096) == 6 * matmul + attention


def test_flops_grow_with_sequence_by_attention_alone() -> None:
    per_position = flops_per_token(QWEN3_30B, 4097) - flops_per_token(QWEN3_30B, 4096)
    assert per_position == 6 * 48 * 32 * (128 + 128) // 2


def test_tied_embedding_counts_once_and_still_works_as_head() -> None:
    tied = replace(QWEN3_30B, tied_embeddings=True)
    assert params_total(QWEN3_30B) - params_total(tied) == 151936 * 2048
    assert params_active_no_embedding(tied) == params_active(tied)
    assert flops_per_token(tied, 4096) == flops_per_token(QWEN3_30B, 4096)


def test_mla_without_query_rank_projects_directly() -> None:
    attention = mla(16, q_lora_rank=0)
    hidden_size = 2048
    q, kv_down, kv_up, out = 2048 * 16 * 192, 2048 * 576, 512 * 16 * 256, 16 * 128 * 2048
    assert attention.matmul_params(hidden_size) == q + kv_down + kv_up + out
    assert attention.vector_params(hidden_size) == 512
