"""The record of layouts that were compared: what README's table is made from."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from moe.durable import write_atomically


@pytest.fixture(scope="session")
def record_layout(request: pytest.FixtureRequest) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Takes a table's name and a row; with --layout-json FILE the rows are in FILE at the end.

    Rows of an earlier run on the same commit stay: the matrix need not run in one go.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    yield lambda table, row: rows.append((table, row))
    target = request.config.getoption("--layout-json")
    if target is None:
        return
    path, record = Path(target), environment()
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier["commit"] == record["commit"]:
            record = earlier
    for table, row in rows:
        kept = [other for other in record.get(table, []) if key_of(other) != key_of(row)]
        record[table] = sorted([*kept, row], key=key_of)
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row is about."""
    return tuple(str(row[name]) for name in ("model", "ranks", "layout", "from", "to") if name in row)


def environment() -> dict[str, Any]:
    """Machine, versions and commit."""
    repository = Path(__file__).parents[2]
    head = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    return {
        "commit": subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }
