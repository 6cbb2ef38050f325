"""The findings of `moe doctor`, for a person and for a program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from moe.errors import MoeError
from moe.launch.doctor.check import Check, Status, worst
from moe.launch.table import table

_SHOWN_NODES = 4


class DoctorError(MoeError):
    """At least one check failed."""

    on_all_ranks = True


@dataclass(frozen=True)
class NodeReport:
    """The checks of one node."""

    host: str
    checks: Sequence[Check]


@dataclass(frozen=True)
class Report:
    """The checks of all nodes, and those of the job as a whole."""

    nodes: Sequence[NodeReport]
    job: Sequence[Check]

    @property
    def status(self) -> Status:
        """The worst of all."""
        return worst([*self.job, *(check for node in self.nodes for check in node.checks)])

    def failed(self) -> list[str]:
        """Names of the failed checks, each once."""
        every = [*(check for node in self.nodes for check in node.checks), *self.job]
        return list(dict.fromkeys(check.name for check in every if check.status == "fail"))

    def as_json(self) -> str:
        """One JSON object."""
        return json.dumps({"status": self.status, **asdict(self)})

    def as_table(self) -> str:
        """A line for each finding; nodes that found the same share one. Remedies stand below."""
        merged: dict[Check, list[str]] = {}
        for node in self.nodes:
            for check in node.checks:
                merged.setdefault(check, []).append(node.host)
        rows = [
            [check.name, check.status, self._where(hosts), check.value] for check, hosts in merged.items()
        ]
        rows += [[check.name, check.status, "job", check.value] for check in self.job]
        remedies = [
            f"{check.status}: {check.name}: {check.remedy}" for check in [*merged, *self.job] if check.remedy
        ]
        return "\n".join([table(["check", "status", "where", "found"], rows), "", *remedies]).rstrip()

    def _where(self, hosts: Sequence[str]) -> str:
        if len(hosts) == len(self.nodes):
            return "node" if len(hosts) == 1 else f"all {len(hosts)} nodes"
        rest = len(hosts) - _SHOWN_NODES
        return ", ".join(hosts[:_SHOWN_NODES]) + (f" and {rest} more" if rest > 0 else "")
