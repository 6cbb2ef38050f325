"""What looks on while a training is measured, and where that training is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Watch(Protocol):
    """Sees every step, and ends the training by itself."""

    def log(self, record: Mapping[str, Any]) -> None:
        """After each step; the fields are those of metrics.jsonl."""
        ...

    @property
    def done(self) -> bool:
        """Whether the training may stop."""
        ...


@dataclass(frozen=True)
class Machines:
    """Where the ranks of the job are.

    Attributes:
        hosts: Names, that of rank 0 first.
        gpu_uuids: Of all ranks; empty on a CPU.
        own_gpu_uuids: Those on the machine of rank 0, which alone can read or set them.
    """

    hosts: tuple[str, ...]
    gpu_uuids: tuple[str, ...]
    own_gpu_uuids: tuple[str, ...]
