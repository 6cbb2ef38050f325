"""permute_index against its reference, bit by bit."""

from __future__ import annotations

import pytest
import torch

from moe.kernels.permute_index import pad_to_tiles, permute_index
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


def test_padding_gives_each_expert_whole_tiles():
    ends_E = torch.tensor([5, 5, 8, 9], dtype=torch.int32)  # 5, 0, 3 and 1 rows; one of the ten is a sentinel
    rows_P, padded_ends_E = pad_to_tiles(ends_E, 10, 4)
    assert rows_P.tolist() == [0, 1, 2, 3, 4, -1, -1, -1, 5, 6, 7, -1, 8, -1, -1, -1] + [-1] * 4
    assert padded_ends_E.tolist() == [8, 8, 12, 16]


def test_padding_has_room_for_the_worst_routing():
    for counts in ([1, 1, 1], [9, 0, 1], [5, 5, 5], [4, 4, 4]):
        ends_E = torch.tensor(counts).cumsum(0).int()
        rows_P, padded_ends_E = pad_to_tiles(ends_E, sum(counts), 4)
        assert rows_P[rows_P >= 0].tolist() == list(range(sum(counts)))
        assert padded_ends_E[-1] <= rows_P.shape[0]


@pytest.mark.parametrize(
    ("ends", "num_rows", "tile", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), 4, 4, r"int32 vector of at least one expert, got torch.int64"),
        (torch.zeros(0, dtype=torch.int32), 4, 4, r"at least one expert, got torch.int32 of shape \(0,\)"),
        (torch.zeros(4, dtype=torch.int32), -1, 4, "num_rows=-1 must be at least 0"),
        (torch.zeros(4, dtype=torch.int32), 4, 0, "tile=0 at least 1"),
        (torch.zeros(4, dtype=torch.int32), 2**31 - 1, 4, "2147483647 rows need up to 2147483656 padded"),
    ],
)
def test_padding_that_cannot_work_is_refused(ends, num_rows, tile, message):
    with pytest.raises(ValueError, match=message):
        pad_to_tiles(ends, num_rows, tile)
