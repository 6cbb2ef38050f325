"""A loss or gradient that is no number stops every rank before the update, and says where it came from."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from ranks_pool import RankPool
from zero_runs import LAYOUTS, PRELOAD, batches, config_of, zero

ROUTER = "decoder.layers.1.mlp.layer.router.weight_ED"
EXPERT = "decoder.layers.1.mlp.layer.experts.w_down_eDF"
HEAD = "output_layer.weight"


def weights_of(engine: Any) -> list[torch.Tensor]:
    """This rank's fp32 ranges."""
    held = [shared.range for shared in engine.state.parameters]
    return [part.of(part.flat).clone() for part in held if part.flat is not None]


def poison_weight(engine: Any, key: str) -> None:
    """NaN in a parameter: of the last rank under ZeRO-1 and 2; ZeRO-3 has one for all."""
    for shared in engine.state.parameters:
        if shared.template.key != key:
            continue
        if engine.state.zero_stage == 3 and shared.range.flat is not None:
            shared.range.of(shared.range.flat).fill_(float("nan"))
        elif engine.rank == engine.world_size - 1:
            shared.parameter.data.fill_(float("nan"))
    if engine.state.zero_stage == 3:
        engine.state._spread()


def poison_gradient(engine: Any, key: str) -> None:
    """Infinity in the gradient of a parameter, on the last rank only."""
    for shared in engine.state.parameters:
        if shared.template.key == key and engine.rank == engine.world_size - 1:
            shared.parameter.register_hook(lambda gradient: gradient + float("inf"))


def diverge(overrides: tuple[str, ...], kind: str, key: str) -> tuple[str, bool]:
    """On one rank: the error, and whether all weights are as before."""
    from moe.engine.base import TrainingDivergedError
    from moe.engine.deepspeed import DeepSpeedEngine

    torch.set_num_threads(1)
    config = config_of(("model.mtp_layers=0", *overrides), int(os.environ["WORLD_SIZE"]))
    engine = DeepSpeedEngine(config)
    try:
        engine.train_step(batches(config, 0, engine.dp_rank, engine.layout.dp), lr=1e-3)
        (poison_weight if kind == "weight" else poison_gradient)(engine, key)
        before = weights_of(engine)
        engine.train_step(batches(config, 1, engine.dp_rank, engine.layout.dp), lr=1e-3)
    except TrainingDivergedError as error:
        same = all(map(lambda a, b: torch.equal(a.nan_to_num(), b.nan_to_num()), weights_of(engine), before))
        return str(error), same
    finally:
        engine.close()
    return "no error", False


@pytest.fixture(scope="module")
def pool(start_ranks: Any) -> RankPool:
    ranks: RankPool = start_ranks(4, init_process_group=False, preload=PRELOAD)
    return ranks


CASES = {
    "loss": ("weight", HEAD, "loss is nan; no update was made. Lower optim.lr"),
    "router": ("weight", ROUTER, "first router with NaN logits is that of layer 1, on rank {ranks}. Lower"),
    "gradient": ("gradient", HEAD, "gradient norm is inf; no update was made. Lower optim.lr"),
    "gradient of experts": ("gradient", EXPERT, "gradient norm is inf; no update was made. Lower optim.lr"),
}
FAST = {("loss", 1, "dp2"), ("router", 2, "ep2"), ("router", 3, "ep2"), ("gradient of experts", 2, "ep2")}


@pytest.mark.parametrize(
    ("case", "stage", "layout", "more"),
    [
        *(
            pytest.param(case, stage, layout, "", marks=[] if fast else pytest.mark.slow)
            for case in CASES
            for stage in (1, 2, 3)
            for layout in ("dp2", "ep2", "tp2 ep2")
            if (fast := (case, stage, layout) in FAST) or layout != "dp2"
        ),
        *(
            pytest.param(case, stage, "ep2", more, marks=pytest.mark.slow)
            for case in CASES
            for stage in (1, 2, 3)
            for more in ("train.precision=bf16", "engine.offload=optimizer")
        ),
    ],
)
def test_every_rank_stops_before_the_update(
    pool: RankPool, case: str, stage: int, layout: str, more: str
) -> None:
    kind, key, words = CASES[case]
    num_ranks, overrides = LAYOUTS[layout]
    kept = (*overrides, *zero(stage), *more.split())
    results = pool.run(diverge, kept, kind, key, num_ranks=num_ranks)
    everywhere = ", ".join(map(str, range(num_ranks)))
    for message, same in results:
        assert words.format(ranks=everywhere if stage == 3 else num_ranks - 1) in message
        assert same
