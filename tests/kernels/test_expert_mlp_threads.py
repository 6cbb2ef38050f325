"""The CPU experts with threads: the same bits as with one, errors raised, torch's setting as it was."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, current_thread

import pytest
import torch
from routed_pairs import some_ids
from tolerances import LARGEST_DIFFERENCE, difference
from torch import Tensor

from moe.kernels.expert_mlp import expert_mlp
from moe.kernels.expert_mlp.sums import sum_of_experts
from moe.kernels.expert_mlp.threads import share_experts
from moe.kernels.permute_index import permute_index

T, D, F, E, K = 96, 32, 16, 8, 2
EVEN = [(expert, slice(expert, expert + 1)) for expert in range(40)]


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(ids_TK: Tensor, num_threads: int, dtype: torch.dtype) -> list[Tensor]:
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(0)
    shapes = ((T, D), (E, 2 * F, D), (E, D, F), ids_TK.shape)
    dtypes = (dtype, dtype, dtype, torch.float32)
    leaves = [
        torch.randn(shape, generator=generator).to(kind).requires_grad_()
        for shape, kind in zip(shapes, dtypes, strict=True)
    ]
    y_TD = expert_mlp(*leaves, permute_index(ids_TK.flatten(), E), backend="torch")
    return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, torch.ones_like(y_TD))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # their sums are made in different ways
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype):
    alone = run(some_ids(T, E, K), 1, dtype)
    for num_threads in (2, 3):
        assert all(map(torch.equal, alone, run(some_ids(T, E, K), num_threads, dtype)))
        assert torch.get_num_threads() == num_threads


def test_many_threads_add_up_at_the_end():
    few, many = (run(some_ids(T, E, 4), num_threads, torch.float32) for num_threads in (8, 9))
    for one, other in zip(few, many, strict=True):
        assert difference(one, other) < LARGEST_DIFFERENCE[torch.float32]


def test_rows_are_added_in_order_though_the_first_come_last():
    torch.set_num_threads(2)
    late, ids_TK = Event(), torch.arange(3).expand(4, 3)
    values = {0: 1e8, 1: -1e8, 2: 1.0}  # 1.0 in this order, 0.0 if the first is added last

    def work(expert: int, rows: slice, _: Tensor | None) -> Tensor:
        if expert == 0:
            assert late.wait(10)
        elif expert == 2:
            late.set()
        return torch.full((rows.stop - rows.start, 5), values[expert])

    sums_TD = sum_of_experts(work, torch.empty(4, 5), torch.empty(4, 3), permute_index(ids_TK.flatten(), 3))
    assert torch.equal(sums_TD, torch.ones(4, 5))


def test_every_expert_is_computed_once_by_threads_that_are_alone():
    torch.set_num_threads(3)
    seen = []
    share_experts(
        lambda expert, _: seen.append((expert, current_thread().name, torch.get_num_threads())), EVEN
    )
    assert sorted(expert for expert, _, _ in seen) == list(range(40))
    assert {threads for _, _, threads in seen} == {1}
    assert current_thread().name not in {name for _, name, _ in seen}


def test_an_expert_larger_than_a_share_keeps_all_threads():
    torch.set_num_threads(3)
    seen = []
    hot = [(0, slice(0, 50)), (1, slice(50, 60)), (2, slice(60, 75))]
    share_experts(lambda expert, _: seen.append((expert, torch.get_num_threads())), hot)
    assert seen == [(0, 3), (2, 3), (1, 3)], "the largest first"


def test_an_error_in_a_thread_is_raised_and_the_setting_restored():
    def fail(expert: int, _: slice) -> None:
        if expert == 7:
            raise ArithmeticError("of expert 7")

    torch.set_num_threads(2)
    with pytest.raises(ArithmeticError, match="of expert 7"):
        share_experts(fail, EVEN)
    assert torch.get_num_threads() == 2


def test_inference_mode_with_threads():
    with torch.inference_mode():
        x_TD, gate_up, down = torch.randn(T, D), torch.randn(E, 2 * F, D), torch.randn(E, D, F)
        inputs = (x_TD, gate_up, down, torch.rand(T, K), permute_index(some_ids(T, E, K).flatten(), E))
        torch.set_num_threads(2)
        two = expert_mlp(*inputs, backend="torch")
        torch.set_num_threads(1)
        assert torch.equal(two, expert_mlp(*inputs, backend="torch"))
