"""Which failure of a job is told and which is worth a restart: exit codes, as torch's agent reports them."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState

from moe.errors import RankLostError, RunStoppedError
from moe.launch.agent import NodeAgent, RankFailedError, cause, worth_a_restart

PIDS = {rank: 100 + rank for rank in range(4)}


@pytest.mark.parametrize(
    ("exit_codes", "kind", "exit_code", "words"),
    [
        ({0: 4, 1: -signal.SIGKILL}, RankLostError, 4, "rank 1 (process 101) was killed by SIGKILL"),
        (
            {0: -signal.SIGTERM, 1: -signal.SIGSEGV},
            RankLostError,
            4,
            "rank 1 (process 101) was killed by SIGSEGV",
        ),
        ({0: 4, 1: 2}, RankFailedError, 2, "rank 1 ended with exit code 2"),
        ({0: -signal.SIGTERM, 1: 3, 2: 4}, RankFailedError, 3, "rank 1 ended with exit code 3"),
        ({2: 1, 1: 1}, RankFailedError, 1, "rank 1 ended with exit code 1"),
        ({0: -signal.SIGTERM, 1: 4}, RankLostError, 4, "ranks 0, 1 lost contact"),
        ({0: -signal.SIGTERM, 1: 5}, RunStoppedError, 5, "stopped on request"),
    ],
)
def test_the_failure_that_explains_the_others_is_told(exit_codes, kind, exit_code, words):
    error = cause(exit_codes, PIDS)
    assert type(error) is kind
    assert error.exit_code == exit_code
    assert words in str(error)


@pytest.mark.parametrize(
    ("exit_codes", "worth"),
    [([1], True), ([4, -signal.SIGKILL], True), ([4, 2], False), ([3], False), ([5, -signal.SIGTERM], False)],
)
def test_what_would_only_repeat_is_not_started_again(exit_codes, worth):
    assert worth_a_restart(exit_codes) == worth


def agent_with(steps: list[int]) -> NodeAgent:
    """An agent of a job with 3 restarts, without the processes; `steps` are the newest at each failure."""
    agent = NodeAgent.__new__(NodeAgent)
    agent._newest_step = lambda: steps.pop(0)
    agent._note = lambda text: None
    agent._step_at_failure = -1
    agent.stopping = False
    agent._remaining_restarts = 3
    agent._worker_group = SimpleNamespace(spec=SimpleNamespace(max_restarts=3))
    return agent


def restarts_left(agent: NodeAgent) -> int:
    """What a killed rank leaves; a restart is then used, as torch's loop does it."""
    failure = SimpleNamespace(exitcode=-signal.SIGKILL, pid=100)
    left = agent._restarts_left(RunResult(state=WorkerState.FAILED, failures={0: failure}))
    agent._remaining_restarts = left - 1
    return left


def test_crash_loop_ends_and_progress_gives_restarts_back():
    assert [restarts_left(agent) for agent in [agent_with([-1] * 4)] for _ in range(4)] == [3, 2, 1, 0]
    assert [restarts_left(agent) for agent in [agent_with([10, 20, 20, 30])] for _ in range(4)] == [
        3,
        3,
        2,
        3,
    ]


def test_failure_during_a_stop_is_the_end():
    agent = agent_with([10])
    agent.stopping = True
    assert restarts_left(agent) == 0
