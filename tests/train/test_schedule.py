"""Learning rate and batch by step: closed forms at the joints, every sample once."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import pytest
from checkpoint_tensors import assert_bit_equal
from train_runs import command, losses, metrics, run, train_command

from moe.config.schema import BatchStage, OptimSection, TrainSection
from moe.train.schedule import global_batch, learning_rate

STEPS = 100


def rates(**values: object) -> list[float]:
    optim = OptimSection.model_validate({"lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, **values})
    return [learning_rate(step, optim, STEPS) for step in range(STEPS + 5)]


@pytest.mark.parametrize("values", [{}, {"schedule": "wsd", "stable_steps": 60}, {"schedule": "constant"}])
def test_warm_up_is_linear_and_reaches_lr(values: dict[str, object]) -> None:
    assert rates(**values)[:11] == pytest.approx([0.1 * step for step in range(1, 11)] + [1.0])


def test_cosine_falls_to_min_lr_and_stays() -> None:
    found = rates()
    assert found[55] == pytest.approx(0.55)  # half way
    assert found[32] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 22 / 90)) / 2)
    assert found[100:] == pytest.approx([0.1] * 5)
    assert all(a >= b for a, b in itertools.pairwise(found[10:]))


def test_wsd_stays_then_falls() -> None:
    found = rates(schedule="wsd", stable_steps=60, decay_steps=80)
    assert found[10:61] == [1.0] * 51
    assert found[61] < 1.0
    assert found[70] == pytest.approx(0.55)
    assert found[80:] == pytest.approx([0.1] * 25)


def test_constant_stays() -> None:
    assert set(rates(schedule="constant")[10:]) == {1.0}


def test_decay_of_a_stable_rate_begins_anew_in_a_longer_run() -> None:
    """The point of WSD: a run stopped before its decay goes on with more steps as if it had known them."""
    optim = OptimSection(lr=1.0, schedule="wsd", stable_steps=60)
    longer = optim.model_copy(update={"stable_steps": 160})
    before = range(60)
    assert [learning_rate(s, optim, 100) for s in before] == [learning_rate(s, longer, 200) for s in before]


def test_batches_of_all_stages_take_every_sample_once_in_order() -> None:
    stages = tuple(BatchStage(steps=n, global_batch_size=b) for n, b in ((3, 2), (1, 4), (2, 6)))
    train = TrainSection(steps=10, global_batch_size=8, micro_batch_size=1, batch_schedule=stages)
    batches = [global_batch(step, train) for step in range(10)]
    assert [len(batch) for batch in batches] == [2, 2, 2, 4, 6, 6, 8, 8, 8, 8]
    assert list(itertools.chain(*batches)) == list(range(6 + 4 + 12 + 32))


def test_without_stages_a_step_takes_the_samples_that_its_number_says() -> None:
    train = TrainSection(steps=10, global_batch_size=8, micro_batch_size=1)
    assert global_batch(7, train) == range(56, 64)


RAMP = (
    "train.steps=6",
    "train.global_batch_size=8",
    "train.batch_schedule=[{steps: 2, global_batch_size: 4}, {steps: 2, global_batch_size: 6}]",
    "train.micro_batch_size=1",
    "train.eval_sequences=4",
    "checkpoint.interval=3",
)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose batch grows, with a checkpoint within the second stage."""
    run_dir = tmp_path_factory.mktemp("grown") / "run"
    run(train_command(run_dir, *RAMP))
    return run_dir


def test_run_with_a_growing_batch_resumes_bit_equal(grown: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(grown, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000006")
    run(command("resume", str(copy)))
    assert losses(copy) == losses(grown)
    assert_bit_equal(*(path / "checkpoints" / "step_00000006" for path in (copy, grown)))
    assert [record["tokens"] for record in metrics(copy)] == [64 * n for n in (4, 8, 14, 20, 28, 36)]


@pytest.mark.slow
def test_growing_batch_gives_the_same_losses_on_two_ranks(grown: Path, tmp_path: Path) -> None:
    run(train_command(tmp_path / "run", *RAMP, "parallel.ep=2", nproc=2))
    assert losses(tmp_path / "run") == pytest.approx(losses(grown), rel=1e-4)
