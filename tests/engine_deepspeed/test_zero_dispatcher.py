"""DeepSpeed's engine takes DeepEP from the same place as Megatron's; on the double of its package."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from fake_deep_ep import double
from zero_runs import PRELOAD, Task, train, zero

SETTINGS = ("train.precision=bf16", "parallel.ep=2", *zero(3))


def train_on_double(task: Task) -> dict[str, Any]:
    library = double("Buffer")
    with (
        patch("moe.engine.fused_dispatcher.import_library", lambda _: library),
        patch("moe.engine.fused_dispatcher.require_gpu"),
    ):
        result = train(task)
    # Two dispatches of the check; then those of each layer in each micro-batch, of 2 sequences of 16 tokens.
    assert len(library.Buffer.sends) > 2 and set(library.Buffer.sends[2:]) == {32}
    assert library.Buffer.freed == [True]
    return result


@pytest.mark.slow
def test_stage_3_trains_alike(start_ranks: Any) -> None:
    pool = start_ranks(2, init_process_group=False, preload=PRELOAD)
    (expected, *_) = pool.run(train, Task(SETTINGS, steps=2))
    (found, *_) = pool.run(train_on_double, Task((*SETTINGS, "parallel.dispatcher=deepep"), steps=2))
    for name in ("loss", "mtp_loss", "grad_norm", "heldout"):
        assert found[name] == pytest.approx(expected[name], rel=1e-2), name
