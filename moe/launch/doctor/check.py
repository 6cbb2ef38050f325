"""The result of one check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail", "skipped"]
_ORDER: tuple[Status, ...] = ("skipped", "ok", "warn", "fail")  # from harmless to fatal


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and what to do about it.

    Attributes:
        name: The check.
        status: warn is worth a look, fail will stop or spoil a run, skipped had nothing to look at.
        value: What was measured, with its unit, or why nothing was.
        remedy: What to do; empty where all is well.
    """

    name: str
    status: Status
    value: str
    remedy: str = ""


def worst(checks: Sequence[Check]) -> Status:
    """The status that counts for all of them."""
    return max((check.status for check in checks), key=_ORDER.index, default="ok")
