"""Which layers a chunk of the pipeline holds, and which positions a context-parallel rank."""

from __future__ import annotations

import pytest
import torch

from moe.config.schema import AttentionSection, ModelSection, ParallelSection
from moe.model.context_parallel import positions_of
from moe.model.pipeline import layers_of_chunks, megatron_layout


def model(num_layers: int, vocab_size: int = 128) -> ModelSection:
    return ModelSection(
        num_layers=num_layers,
        hidden_size=64,
        ffn_hidden_size=128,
        vocab_size=vocab_size,
        num_experts=4,
        top_k=2,
        expert_hidden_size=128,
        attention=AttentionSection(num_heads=2, head_dim=32),
    )


@pytest.mark.parametrize(
    ("num_layers", "parallel", "expected"),
    [
        (4, {}, (4,)),
        (8, {"pp": 4}, (2, 2, 2, 2)),
        (9, {"pp": 4}, (2, 2, 3, 2)),
        (11, {"pp": 4}, (3, 3, 3, 2)),
        (3, {"pp": 2}, (2, 1)),
        (5, {"pp": 2, "vpp": 2}, (1, 1, 2, 1)),
        (5, {"pp": 2, "stage_layers": (5, 0)}, (5, 0)),
    ],
)
def test_layers_are_spread_evenly_and_the_ends_hold_less(
    num_layers: int, parallel: dict[str, object], expected: tuple[int, ...]
) -> None:
    assert layers_of_chunks(model(num_layers), ParallelSection.model_validate(parallel)) == expected


def test_output_layer_takes_the_place_of_the_layers_that_it_is_worth() -> None:
    # A layer is 65,536 weights on the path of a token; an output layer over 2,048 words is twice that.
    assert layers_of_chunks(model(6, vocab_size=2048), ParallelSection(pp=2)) == (4, 2)


def test_megatron_is_told_of_embedding_further_tokens_and_loss() -> None:
    model = ModelSection.model_construct(num_layers=3, mtp_layers=1)
    parallel = ParallelSection(pp=2, vpp=2, stage_layers=(0, 2, 1, 0))
    layout = megatron_layout(model, parallel)
    assert layout == [["embedding"], ["decoder", "decoder"], ["decoder"], ["mtp", "loss"]]


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_ranks_hold_every_position_once_and_see_as_much(cp: int) -> None:
    length = 24 // cp
    held = [positions_of(rank, cp, length, torch.device("cpu")) for rank in range(cp)]
    assert torch.cat(held).sort().values.tolist() == list(range(24))
    assert len({int((places + 1).sum()) for places in held}) == 1  # pairs of query and key
