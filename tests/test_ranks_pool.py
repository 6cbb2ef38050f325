"""The tool that distributed tests stand on must itself report failures instead of hanging."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from ranks_pool import RankError


@dataclass(frozen=True)
class Seen:
    """What a rank saw; its class lives in this file, which only pytest can import."""

    rank: int
    total: torch.Tensor
    num_threads: int


def sum_of_ranks(value: Seen) -> Seen:
    total = value.total + dist.get_rank()
    dist.all_reduce(total)
    return Seen(dist.get_rank(), total, torch.get_num_threads())


def process_id() -> int:
    return os.getpid()


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("seven is not even")
    dist.barrier()


def sleep_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def join_by_environment() -> tuple[str, int]:
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    return os.environ["LOCAL_RANK"], dist.get_world_size()


def die_on_rank_1() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


@pytest.fixture(scope="module")
def pool(start_ranks):
    return start_ranks(2)


@pytest.fixture(scope="module")
def bare_pool(start_ranks):
    return start_ranks(2, init_process_group=False)


def test_results_come_back_in_rank_order(pool):
    for num_ranks, expected in ((2, [21.0, 21.0]), (1, [10.0]), (2, [21.0, 21.0])):
        seen = pool.run(sum_of_ranks, Seen(-1, torch.tensor(10.0), -1), num_ranks=num_ranks)
        assert [s.rank for s in seen] == list(range(num_ranks))
        assert [s.total.item() for s in seen] == expected
        assert {s.num_threads for s in seen} == {1}


def test_processes_are_kept_between_runs(pool):
    process_ids = pool.run(process_id)
    assert len({*process_ids, os.getpid()}) == 3
    assert pool.run(process_id) == process_ids


def test_a_hung_rank_is_killed_in_time_with_its_stack(pool):
    pool.run(process_id)  # start-up is not what is timed
    started_s = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)^rank 0 of 2 did not return in 0.5 s.*in sleep_on_rank_0"):
        pool.run(sleep_on_rank_0, timeout_s=0.5)
    assert time.monotonic() - started_s < 5


def test_an_error_names_its_rank_and_line(pool):
    with pytest.raises(
        RankError, match=r"(?s)rank 1 of 2 raised.*in fail_on_rank_1.*ValueError: seven is not even"
    ):
        pool.run(fail_on_rank_1)


def test_a_function_can_open_the_process_group_itself_and_again(bare_pool):
    for _ in range(2):
        assert bare_pool.run(join_by_environment) == [("0", 2), ("1", 2)]


def test_a_killed_rank_is_reported(bare_pool):
    with pytest.raises(RankError, match="rank 1 of 2 ended with exit code -9"):
        bare_pool.run(die_on_rank_1)
