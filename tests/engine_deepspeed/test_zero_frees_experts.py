"""ZeRO-3 holds whole expert weights only while it computes with them: else no large model would fit."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from ranks_pool import RankPool
from zero_runs import PRELOAD, batches, config_of, zero

# Tensors of experts above 100,000 elements: DeepSpeed keeps smaller ones whole.
LARGE = ("model.hidden_size=128", "model.expert_hidden_size=128", "model.num_layers=3", "model.mtp_layers=0")


ONE_LAYER_BYTES = 4 * 8 * (2 * 128 * 128 + 128 * 128)  # fp32, 8 experts
MICRO_BATCHES = 2


class Watch:
    """Notes the bytes of expert weights that a rank holds whole, by the moment."""

    def __init__(self, engine: Any) -> None:
        layers = {index: adapter.layer.experts for index, adapter in engine.moe_layers.items()}
        self.parameters = [parameter for experts in layers.values() for parameter in experts.parameters()]
        self.held: dict[str, list[int]] = {}
        for index, experts in layers.items():
            experts.register_forward_hook(partial(self.note, f"forward of layer {index}"))
            experts.w_gate_up_eGD.register_hook(partial(self.note, f"gradient in layer {index}"))
        backward = engine.zero.backward

        def noted(*args: Any, **kwargs: Any) -> None:
            self.note("forward")
            backward(*args, **kwargs)
            self.note("backward")

        engine.zero.backward = noted

    def note(self, moment: str, *_: Any) -> None:
        whole_bytes = [parameter.data.untyped_storage().nbytes() for parameter in self.parameters]
        for parameter, held_bytes in zip(self.parameters, whole_bytes, strict=True):
            assert (held_bytes > 0) == (parameter.ds_status.name == "AVAILABLE")
        self.held.setdefault(moment, []).append(sum(whole_bytes))


def bytes_held(overrides: tuple[str, ...]) -> dict[str, list[int]]:
    """On one rank, in the first step; later DeepSpeed keeps weights that are needed again soon."""
    from moe.engine.deepspeed import DeepSpeedEngine

    torch.set_num_threads(1)
    config = config_of((*LARGE, *overrides), int(os.environ["WORLD_SIZE"]))
    engine = DeepSpeedEngine(config)
    try:
        assert engine.num_microbatches == MICRO_BATCHES
        watch = Watch(engine)
        engine.train_step(batches(config, 0, engine.dp_rank, engine.layout.dp), lr=1e-3)
        watch.note("step")
        return watch.held
    finally:
        engine.close()


@pytest.fixture(scope="module")
def pool(start_ranks: Any) -> RankPool:
    ranks: RankPool = start_ranks(2, init_process_group=False, preload=PRELOAD)
    return ranks


def test_experts_are_freed_after_forward_and_after_backward(pool: RankPool) -> None:
    for held in pool.run(bytes_held, zero(3)):
        assert held["forward of layer 1"][0] == held["forward of layer 2"][0] == held["forward"][0] == 0
        assert held["gradient in layer 2"][0] == held["gradient in layer 1"][0] == ONE_LAYER_BYTES
        assert held["backward"] == [0] * MICRO_BATCHES
        assert held["step"] == [0]
