"""permute_index against its reference, bit by bit."""

from __future__ import annotations

import pytest
import torch

from moe.kernels.permute_index import permute_index
from moe.kernels.permute_index.reference import permute_index_reference

pytestmark = pytest.mark.usefixtures("poison_empty")


def ids_of(kind: str, N: int, E: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(N * E)
    uniform_N = torch.randint(E, (N,), generator=generator)
    if kind == "one_expert":
        return torch.full_like(uniform_N, E - 1)
    if kind == "hot_expert":  # nine in ten pairs
        return torch.where(torch.rand(N, generator=generator) < 0.9, E // 2, uniform_N)
    if kind == "sentinels":  # below and above the experts
        return torch.randint(-2, E + 2, (N,), generator=generator)
    return uniform_N // 2 * 2 if kind == "odd_experts_empty" else uniform_N


@pytest.mark.parametrize("kind", ["uniform", "odd_experts_empty", "hot_expert", "one_expert", "sentinels"])
@pytest.mark.parametrize("E", [1, 3, 16, 100])
@pytest.mark.parametrize("N", [0, 1, 7, 63, 504])
def test_equals_the_reference(N, E, kind):
    ids_N = ids_of(kind, N, E)
    names = ("order", "inverse", "ends")
    results = zip(names, permute_index(ids_N, E), permute_index_reference(ids_N, E), strict=True)
    for name, actual, expected in results:
        assert actual.dtype == expected.dtype == (torch.int32 if name == "ends" else torch.int64), name
        assert torch.equal(actual, expected), name


def test_small_example():
    order_N, inverse_N, ends_E = permute_index(torch.tensor([2, 0, 2, 0, 3]), 5)
    assert order_N.tolist() == [1, 3, 0, 2, 4]
    assert inverse_N.tolist() == [2, 0, 3, 1, 4]
    assert ends_E.tolist() == [2, 2, 4, 5, 5]


def test_sentinels_come_last_and_count_for_no_expert():
    order_N, inverse_N, ends_E = permute_index(torch.tensor([-1, 2, 9, 0, 3]), 3)
    assert order_N.tolist() == [3, 1, 0, 2, 4]
    assert inverse_N.tolist() == [2, 1, 3, 0, 4]
    assert ends_E.tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), r"int64 vector, got torch.int64 of shape \(2, 3\)"),
        (torch.zeros(6, dtype=torch.int32), r"int64 vector, got torch.int32 of shape \(6,\)"),
        (torch.empty(2**31, dtype=torch.int64, device="meta"), "at most 2147483647 pairs, got 2147483648"),
    ],
    ids=["matrix", "int32", "too_many"],
)
def test_other_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        permute_index(ids, 4)


def test_no_experts_are_refused():
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        permute_index(torch.zeros(6, dtype=torch.int64), 0)
