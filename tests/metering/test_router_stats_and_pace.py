"""Balance numbers on counts whose answer is known, and the pace on a clock that the test moves."""

from __future__ import annotations

import numpy as np
import pytest

from moe.metering.router_stats import router_stats
from moe.metering.throughput import StepClock


def test_even_load_is_one_everywhere() -> None:
    stats = router_stats(np.full((3, 8), 5))
    assert (stats.load_max_over_mean, stats.mean_load_max_over_mean) == (1.0, 1.0)
    assert stats.entropy == pytest.approx(1.0)
    assert stats.num_dead_experts == 0


def test_collapse_and_even_layer_are_told_apart() -> None:
    stats = router_stats([[0, 0, 12, 0], [3, 3, 3, 3]])
    assert stats.load_max_over_mean == 4.0
    assert stats.mean_load_max_over_mean == 2.5
    assert stats.entropy == pytest.approx((0.0 + 1.0) / 2)
    assert stats.num_dead_experts == 3


def test_entropy_of_two_of_four_experts_is_half() -> None:
    assert router_stats([[7, 7, 0, 0]]).entropy == pytest.approx(0.5)


def test_layer_without_tokens_is_left_out_but_its_experts_are_dead() -> None:
    stats = router_stats([[0, 0], [1, 3]])
    assert stats.load_max_over_mean == stats.mean_load_max_over_mean == 1.5
    assert stats.num_dead_experts == 2


@pytest.mark.parametrize("counts", [np.zeros((2, 4), int), np.zeros((0, 4), int)])
def test_no_tokens_at_all_has_no_balance(counts: np.ndarray) -> None:
    stats = router_stats(counts)
    assert stats.load_max_over_mean is stats.mean_load_max_over_mean is stats.entropy is None
    assert stats.num_dead_experts == counts.size


def test_one_expert_is_balanced() -> None:
    assert router_stats([[9]]).entropy == 1.0


@pytest.mark.parametrize("counts", [[1, 2], [[-1, 2]], np.zeros((2, 0))])
def test_impossible_counts_are_refused(counts: object) -> None:
    with pytest.raises(ValueError, match="counts"):
        router_stats(counts)  # type: ignore[arg-type]


def test_pace_uses_only_the_window() -> None:
    now_s = 0.0
    clock = StepClock(10, window_steps=2, clock=lambda: now_s)
    now_s = 100.0
    first = clock.tick(200)
    assert (first.step_s, first.tokens_per_s, first.eta_s) == (100.0, 2.0, 900.0)
    now_s = 101.0
    clock.tick(200)
    now_s = 104.0
    third = clock.tick(200)
    # The slow first step is forgotten: 400 tokens in 4 s, 7 steps left at 2 s.
    assert (third.step_s, third.tokens_per_s, third.eta_s) == (3.0, 100.0, 14.0)


def test_pace_survives_a_clock_that_stands_still() -> None:
    assert StepClock(1, clock=lambda: 5.0).tick(10).eta_s == 0.0
