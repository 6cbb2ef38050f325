"""How long-running functions of this folder say what they are doing."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str], None]
"""Receives one short line of plain English now and then."""


def silent(line: str) -> None:
    """Ignore `line`; the `Progress` of a caller who asked for none."""
