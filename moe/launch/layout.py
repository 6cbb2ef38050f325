"""Which ranks work together: the groups of each parallel axis, and which of them stay inside a node.

Ranks are numbered as in Megatron-Core: tensor fastest, then context, data, pipeline. Experts have their own
order over the ranks of a stage: expert-tensor, expert, expert-data. A node has consecutive ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.config.schema import ParallelSection
from moe.launch.table import table

_SHOWN = 4  # ranks of a group or nodes of a job that are listed before the rest is left out


@dataclass(frozen=True)
class Axis:
    """A dimension of the layout: groups of `size` ranks, `stride` apart."""

    name: str
    size: int
    stride: int
    collectives: str

    def groups(self, world_size: int) -> list[range]:
        """The ranks of every group."""
        span = self.size * self.stride
        firsts = [rank for rank in range(world_size) if rank // self.stride % self.size == 0]
        return [range(first, first + span, self.stride) for first in firsts]


def axes(parallel: ParallelSection, world_size: int) -> list[Axis]:
    """The axes of a layout whose sizes fit together (moe/config/rules.py checks that)."""
    tp, cp, pp, ep, etp = parallel.tp, parallel.cp, parallel.pp, parallel.ep, parallel.etp
    stage = world_size // pp
    return [
        Axis("tp", tp, 1, "all-gather, reduce-scatter of activations, every layer"),
        Axis("cp", cp, tp, "keys and values, every layer"),
        Axis("etp", etp, 1, "rows of split experts to all, partial sums back, every expert layer"),
        Axis("ep", ep, etp, "all-to-all of tokens, every expert layer"),
        Axis(
            "dp",
            stage // (tp * cp),
            tp * cp,
            "reduce-scatter of gradients, all-gather of weights, every step",
        ),
        Axis("edp", stage // (ep * etp), ep * etp, "the same for experts, every step"),
        Axis("pp", pp, stage, "send, receive of activations, every micro-batch"),
    ]


def nodes_of(group: range, gpus_per_node: int) -> int:
    """How many nodes the ranks of a group are on."""
    return len({rank // gpus_per_node for rank in group})


def layout_table(parallel: ParallelSection, *, nodes: int, gpus_per_node: int) -> str:
    """The groups of every axis, then the nodes with the place of their ranks on each axis."""
    world_size = nodes * gpus_per_node
    found = axes(parallel, world_size)
    rows = []
    for axis in found:
        groups = axis.groups(world_size)
        most = max(nodes_of(group, gpus_per_node) for group in groups)
        where = "alone" if axis.size == 1 else "inside a node" if most == 1 else f"across {most} nodes"
        rows.append([axis.name, str(axis.size), str(len(groups)), _ranks(groups[0]), where, axis.collectives])
    head = ["axis", "size", "groups", "first group", "where", "collectives"]
    return f"{table(head, rows)}\n\n{_nodes_table(found, nodes, gpus_per_node)}"


def _nodes_table(found: list[Axis], nodes: int, gpus_per_node: int) -> str:
    rows = []
    for node in range(nodes):
        if _SHOWN <= node < nodes - 1:
            if node == _SHOWN:
                rows.append(["..."] + [""] * (len(found) + 1))
            continue
        ranks = range(node * gpus_per_node, (node + 1) * gpus_per_node)
        places = [{rank // axis.stride % axis.size for rank in ranks} for axis in found]
        rows.append([str(node), _interval(set(ranks)), *map(_interval, places)])
    return table(["node", "ranks", *(axis.name for axis in found)], rows)


def _ranks(group: range) -> str:
    shown = ", ".join(map(str, group[:_SHOWN]))
    return shown if len(group) <= _SHOWN else f"{shown}, ... {group[-1]}"


def _interval(values: set[int]) -> str:
    first, last = min(values), max(values)
    return str(first) if first == last else f"{first}-{last}"
