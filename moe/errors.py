"""Typed errors. Each carries the process exit code that the command line documents.

Exit codes: 0 done, 1 anything else, 2 bad input or config, 3 corrupt data or checkpoint, 4 a rank was lost,
5 stopped on request after a checkpoint, to be started again.
"""

from __future__ import annotations


class MoeError(Exception):
    """Base of every error that a user can act on; its text says what was wrong and what to do."""

    exit_code = 1
    on_all_ranks = False  # whether every rank of the job raises the same, so that rank 0 speaks for all


class InputError(MoeError):
    """An argument, path or config value that cannot be used."""

    exit_code = 2


class CorruptDataError(MoeError):
    """Training data that is damaged; the text names the file and the byte offset or line."""

    exit_code = 3


class CorruptCheckpointError(MoeError):
    """A checkpoint file that does not match its manifest; the text names the file."""

    exit_code = 3


class RunInterruptedError(MoeError):
    """The user or the system asked the run to stop."""


class RankLostError(MoeError):
    """A rank of the job died or became unreachable; the text names the rank."""

    exit_code = 4


class RunStoppedError(MoeError):
    """The system asked the run to stop, which it did after a checkpoint; started again, it goes on."""

    exit_code = 5
    on_all_ranks = True
