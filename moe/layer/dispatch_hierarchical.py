"""All-to-all in two hops: a token crosses the network once for each node that holds experts of it.

1. across  to each such node, to the rank with the same place there as this rank
2. inside  from there to each rank of that node that holds experts of it
and home: outputs are added inside the node, then one row for each (token, node) crosses the network. With
routing limited to M nodes (arXiv 2412.19437, section 2.1.2) it carries M rows of a token, not K.

Shapes: T tokens, K top-k, P places that a row may go to (nodes, or ranks of a node), A rows that leave, one
for each (token, place), M the most of one token, R rows that arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.kernels.permute_index import permute_index
from moe.layer.all_to_all import RowsInFlight, all_to_all_rows
from moe.layer.dispatch import Arrive, Dispatcher
from moe.layer.types import Dispatched, Hop, Routing, TwoHops


@dataclass(frozen=True)
class NodeGroups:
    """An expert-parallel group whose ranks lie in several nodes, in the order of the nodes."""

    inside: dist.ProcessGroup  # the ranks of this rank's node
    across: dist.ProcessGroup  # the ranks with this rank's place in all nodes


def split_by_node(
    group: dist.ProcessGroup, ranks_per_node: int, *, timeout_s: float | None = None
) -> NodeGroups:
    """Make both groups; each rank of `group` must call it.

    Args:
        group: expert-parallel ranks; neighbours in it share a node.
        ranks_per_node: of the group.
        timeout_s: longest wait for a lost rank; None is torch's.

    Raises:
        ValueError: if the group is not two or more whole nodes.
    """
    ranks = dist.get_process_group_ranks(group)
    nodes, rest = divmod(len(ranks), ranks_per_node)
    if rest or nodes < 2:
        raise ValueError(
            f"{len(ranks)} expert-parallel ranks are not two or more nodes of {ranks_per_node}; "
            "inside one node use the plain all-to-all"
        )
    node, place = divmod(dist.get_rank(group), ranks_per_node)
    return NodeGroups(
        inside=_new_group(ranks[node * ranks_per_node : (node + 1) * ranks_per_node], timeout_s),
        across=_new_group(ranks[place::ranks_per_node], timeout_s),
    )


def _new_group(ranks: list[int], timeout_s: float | None) -> dist.ProcessGroup:
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    # The other ranks need not call.
    made = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


class HierarchicalDispatcher(Dispatcher):
    """Experts are split over nodes and there over ranks, in order.

    A GPU waits for the host in both hops of each forward, for which rows go where.
    """

    def __init__(self, num_experts: int, groups: NodeGroups, *, backend: str = "auto") -> None:
        self.groups = groups
        self.backend = backend
        self.per_node, rest = divmod(num_experts, groups.across.size())
        self.per_rank, rest_inside = divmod(self.per_node, groups.inside.size())
        if rest or rest_inside:
            raise ValueError(
                f"{num_experts} experts cannot be split over {groups.across.size()} nodes of "
                f"{groups.inside.size()} ranks"
            )

    def start(self, x_TD: Tensor, routing: Routing) -> Arrive:
        """Rows leave for the other nodes; what arrives is handed on inside this one."""
        across = _Travel(x_TD, routing.ids_TK, routing.weights_TK, self.per_node, self.groups.across)

        def arrive() -> Dispatched:
            inside = _Travel(*across.arrived(), self.per_rank, self.groups.inside)
            x_RD, ids_RK, weights_RK = inside.arrived()
            index = permute_index(ids_RK.flatten(), self.per_rank, backend=self.backend)
            return Dispatched(x_RD, weights_RK, index, TwoHops(across.hop, inside.hop))

        return arrive

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Add inside the node, then at home."""
        hops = dispatched.exchange
        if not isinstance(hops, TwoHops):
            raise ValueError("these rows were dispatched by another dispatcher: they carry no two hops")
        y_BD = _send_home(y_RD, hops.inside, self.groups.inside)
        return _send_home(y_BD, hops.across, self.groups.across)


class _Travel:
    """One hop: each row goes once to each place that holds experts of it, with their ids and weights."""

    def __init__(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: int, group: dist.ProcessGroup
    ) -> None:
        """`experts` of each place, which lie there in order; an id below zero is of none."""
        places = group.size()
        place_TK = torch.where(ids_TK >= 0, ids_TK // experts, places)
        goes_TP = torch.zeros(len(ids_TK), places + 1, dtype=torch.bool, device=x_TD.device)
        goes_TP = goes_TP.scatter_(1, place_TK, True)[:, :places]
        place_A, token_A = goes_TP.t().nonzero(as_tuple=True)
        send_P = goes_TP.sum(dim=0)
        recv_P = torch.empty_like(send_P)
        dist.all_to_all_single(recv_P, send_P, group=group)
        self.hop = Hop(
            send_rows=tuple(send_P.tolist()),
            recv_rows=tuple(recv_P.tolist()),
            token_A=token_A,
            rows_TM=_rows_of_tokens(goes_TP, min(places, ids_TK.shape[1])),
        )
        there_AK = place_TK[token_A] == place_A[:, None]
        ids_AK = torch.where(there_AK, ids_TK[token_A] - place_A[:, None] * experts, -1)
        weights_AK = _copy_rows(weights_TK, self.hop) * there_AK
        rows = (_copy_rows(x_TD, self.hop), ids_AK, weights_AK)
        self._flights = [RowsInFlight(x, self.hop.send_rows, self.hop.recv_rows, group) for x in rows]

    def arrived(self) -> tuple[Tensor, Tensor, Tensor]:
        """What came from all places: x, ids here (-1 for experts elsewhere), weights."""
        x_RD, ids_RK, weights_RK = (flight.arrived() for flight in self._flights)
        return x_RD, ids_RK, weights_RK


def _send_home(y: Tensor, hop: Hop, group: dist.ProcessGroup) -> Tensor:
    """The sum at each token of the rows that it sent."""
    y_AD = all_to_all_rows(y, hop.recv_rows, hop.send_rows, group)
    summed: Tensor = _SumRows.apply(y_AD, hop)  # type: ignore[no-untyped-call]
    return summed


def _copy_rows(x: Tensor, hop: Hop) -> Tensor:
    copied: Tensor = _CopyRows.apply(x, hop)  # type: ignore[no-untyped-call]
    return copied


def _rows_of_tokens(goes_TP: Tensor, most: int) -> Tensor:
    """The rows of each token among those that leave, padded with their number A: [T, most]."""
    flat_PT = goes_TP.t().flatten()
    row_PT = torch.where(flat_PT, flat_PT.cumsum(0) - 1, flat_PT.sum())
    return row_PT.view(goes_TP.shape[1], -1).t().sort(dim=1).values[:, :most]


def _summed(y_AD: Tensor, rows_TM: Tensor) -> Tensor:
    """Sum of each token's rows in fp32 or wider, one after another: without atomics runs give equal bits."""
    padded = torch.cat([y_AD, y_AD.new_zeros(1, y_AD.shape[1])])
    wide = torch.promote_types(y_AD.dtype, torch.float32)
    out_TD = torch.zeros(len(rows_TM), y_AD.shape[1], dtype=wide, device=y_AD.device)
    for row_T in rows_TM.unbind(dim=1):
        out_TD += padded[row_T]
    return out_TD.to(y_AD.dtype)


class _CopyRows(torch.autograd.Function):
    """Each token once for each place that it goes to."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, hop: Hop) -> Tensor:
        ctx.hop = hop
        return x_TD[hop.token_A]

    @staticmethod
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor, None]:
        return _summed(grad_AD, ctx.hop.rows_TM), None


class _SumRows(torch.autograd.Function):
    """The transpose."""

    @staticmethod
    def forward(ctx: Any, y_AD: Tensor, hop: Hop) -> Tensor:
        ctx.hop = hop
        return _summed(y_AD, hop.rows_TM)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return grad_TD[ctx.hop.token_A], None
