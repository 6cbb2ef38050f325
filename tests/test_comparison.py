"""What every numerical test leans on: a comparison that can fail, memory that shows it was not written."""

from __future__ import annotations

import pytest
import torch
from tolerances import TOLERANCES, assert_close


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_errors_are_measured_against_the_largest_value(dtype):
    expected = torch.tensor([1e-6, 100.0], dtype=torch.float64)
    close, far = (expected + torch.tensor([100 * TOLERANCES[dtype] * f, 0]) for f in (0.5, 2))
    assert_close("x", close, expected, dtype=dtype)
    with pytest.raises(AssertionError, match=r"^x \("):
        assert_close("x", far, expected, dtype=dtype)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [([float("nan"), 1.0], [0.0, 1.0]), ([1e-30, 0.0], [0.0, 0.0]), ([1.0], [1.0, 1.0])],
    ids=["nan", "not_quite_zero", "shape"],
)
def test_these_are_never_close(actual, expected):
    with pytest.raises(AssertionError):
        assert_close("x", torch.tensor(actual), torch.tensor(expected))


def test_empty_memory_is_poisoned(poison_empty):
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.int64).eq(torch.iinfo(torch.int64).max).all()


def test_poison_does_not_outlive_its_test():
    assert not torch.are_deterministic_algorithms_enabled()
