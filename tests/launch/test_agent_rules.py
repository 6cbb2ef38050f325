"""Which failure of a job is told: exit codes of its ranks, as torch's agent reports them."""

from __future__ import annotations

import signal

import pytest

from moe.errors import RankLostError
from moe.launch.local import RankFailedError, _cause

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
    ],
)
def test_the_failure_that_explains_the_others_is_told(exit_codes, kind, exit_code, words):
    error = _cause(exit_codes, PIDS)
    assert type(error) is kind
    assert error.exit_code == exit_code
    assert words in str(error)
