"""What a config may add to the model: its parameters are counted, and every expert bias is moved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_pool import RankPool

from moe.config import RunConfig, load_config
from moe.counts.counts import params_total
from moe.counts.shape import shape_of

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SMALL = (
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.ffn_hidden_size=24",
    "model.vocab_size=64",
    "model.num_experts=4",
    "model.expert_hidden_size=8",
    "model.shared_expert_hidden_size=8",
    "model.attention.head_dim=6",
    "data.seq_length=12",
    "train.global_batch_size=2",
    "train.micro_batch_size=2",
    "train.eval_sequences=2",
)
FEATURES = {
    "none": (),
    "norm in each head": ("model.attention.qk_norm=head",),
    "norm over all heads": ("model.attention.qk_norm=full",),
    "biases": ("model.attention.qkv_bias=true", "model.attention.output_bias=true"),
    "sinks": ("model.attention.sinks=true",),
    "biased experts and routers": (
        "model.expert_bias=true",
        "model.router.score=softmax",
        "model.router.logit_bias=true",
    ),
    "latent attention": ("model.attention.kind=mla", "model.attention.q_lora_rank=10"),
    "two predictions": ("model.mtp_layers=2",),
    "a prediction with latent attention": ("model.mtp_layers=1", "model.attention.kind=mla"),
    "tied": ("model.tie_embeddings=true", "model.mtp_layers=1"),
}


def config_of(*overrides: str) -> RunConfig:
    return load_config(QUICKSTART, [*SMALL, *overrides])


@pytest.mark.parametrize("feature", FEATURES)
def test_closed_form_counts_what_is_built(feature: str) -> None:
    from moe.engine.one_rank import tensor_shapes

    config = config_of(*FEATURES[feature])
    shapes = tensor_shapes(config)
    built = sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith("bias_E"))
    assert params_total(shape_of(config.model)) == built


def train_with_predictions() -> tuple[list[float], list[float], dict[int, float], int]:
    """Both losses of each step, size of each layer's expert bias, rows of the reported loads."""
    from moe.engine.megatron import MegatronEngine

    config = config_of("model.mtp_layers=1", "model.router.bias_update_rate=0.01")
    engine = MegatronEngine(config)
    tokens_BS = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(0))
    batch = {
        "tokens_BS": tokens_BS[:, :-1].contiguous(),
        "labels_BS": tokens_BS[:, 1:].contiguous(),
        "loss_mask_BS": torch.ones(2, 12),
        "position_ids_BS": torch.arange(12).expand(2, 12),
    }
    try:
        results = [engine.train_step(iter([batch]), lr=1e-2) for _ in range(8)]
        evaluated = engine.evaluate(iter([batch]), 1, torch.ones(64))
        biases = {
            index: float(adapter.layer.router.bias_E.abs().max())
            for index, adapter in engine.moe_layers.items()
        }
    finally:
        engine.close()
    losses = [*(result.loss for result in results), evaluated.nll_nats / evaluated.tokens]
    return losses, [result.mtp_loss for result in results], biases, len(results[0].counts_LE)


def test_prediction_layer_trains_and_balances_its_experts(start_ranks: Any) -> None:
    ranks: RankPool = start_ranks(1, init_process_group=False)
    ((losses, mtp_losses, biases, rows),) = ranks.run(train_with_predictions)
    assert losses[-1] < losses[0] - 0.5
    assert mtp_losses[0] == pytest.approx(math.log(64), rel=0.05)  # of 64 words, before it has learnt any
    assert mtp_losses[-1] < mtp_losses[0] - 0.02
    assert biases.keys() == {1, 2}  # layer 0 is dense, layer 2 predicts the token after the next
    assert min(biases.values()) > 0.005
    assert rows == 1  # loads are reported of the model's own layers
