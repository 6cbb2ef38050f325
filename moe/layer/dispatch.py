"""Tokens to the ranks that hold their experts, and back.

`dispatch` returns all that `combine` needs; nothing is kept in between. The combine weights travel with the
rows and the experts apply them, so that combine only adds, and no rank keeps expert outputs for the backward.
Shapes: moe/layer/types.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe.kernels.combine import permute, unpermute
from moe.kernels.permute_index import permute_index
from moe.layer.all_to_all import RowsInFlight, all_to_all_rows
from moe.layer.types import Dispatched, Exchange, Routing

Arrive = Callable[[], Dispatched]


class Dispatcher(Protocol):
    """Moves rows to experts and expert outputs home."""

    def start(self, x_TD: Tensor, routing: Routing) -> Arrive:
        """Let rows leave; the result waits for those that come and returns them. Once for each start."""
        ...

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Rows for the experts of this rank."""
        return self.start(x_TD, routing)()

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """The sum of each token's weighted expert outputs, y_TD, from y of each row that arrived."""
        ...


class LocalDispatcher(Dispatcher):
    """All experts are on this rank: nothing moves, the experts gather tokens as they load them."""

    def __init__(self, num_experts: int, *, backend: str = "auto") -> None:
        self.num_experts = num_experts
        self.backend = backend

    def start(self, x_TD: Tensor, routing: Routing) -> Arrive:
        """Sort the routed pairs by expert."""
        index = permute_index(routing.ids_TK.flatten(), self.num_experts, backend=self.backend)
        dispatched = Dispatched(x_TD, routing.weights_TK, index, None)
        return lambda: dispatched

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """The experts have added the pairs of each token."""
        return y_RD


class AllToAllDispatcher(Dispatcher):
    """Experts are split over `group` in rank order; rows travel by all-to-all.

    Split sizes are Python integers, so a GPU waits for the host once in each forward.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup, *, backend: str = "auto") -> None:
        self.group = group
        self.backend = backend
        self.num_ranks = dist.get_world_size(group)
        if num_experts % self.num_ranks:
            raise ValueError(
                f"{num_experts} experts cannot be split over {self.num_ranks} expert-parallel ranks"
            )
        self.num_experts = num_experts
        self.num_local_experts = num_experts // self.num_ranks

    def start(self, x_TD: Tensor, routing: Routing) -> Arrive:
        """1 sort by expert, 2 exchange counts, 3 exchange rows and weights, 4 sort what arrived by expert."""
        top_k = routing.ids_TK.shape[1]
        order_N, inverse_N, _ = permute_index(
            routing.ids_TK.flatten(), self.num_experts, backend=self.backend
        )
        x_ND = permute(x_TD, order_N, inverse_N, top_k, backend=self.backend)
        weights_N1 = permute(routing.weights_TK.reshape(-1, 1), order_N, inverse_N, 1, backend=self.backend)
        send_pe = routing.counts_E.view(self.num_ranks, self.num_local_experts)
        recv_pe = torch.empty_like(send_pe)
        dist.all_to_all_single(recv_pe, send_pe.contiguous(), group=self.group)
        send_rows = tuple(send_pe.sum(dim=1).tolist())
        recv_rows = tuple(recv_pe.sum(dim=1).tolist())
        sent = sum(send_rows)  # pairs of sentinel ids come last, and stay
        x_flight = RowsInFlight(x_ND[:sent], send_rows, recv_rows, self.group)
        weights_flight = RowsInFlight(weights_N1[:sent], send_rows, recv_rows, self.group)
        local_ids_p = torch.arange(self.num_local_experts, device=x_TD.device).repeat(self.num_ranks)
        local_ids_R = local_ids_p.repeat_interleave(recv_pe.flatten(), output_size=sum(recv_rows))
        index = permute_index(local_ids_R, self.num_local_experts, backend=self.backend)
        exchange = Exchange(send_rows, recv_rows, order_N, inverse_N, top_k)
        return lambda: Dispatched(x_flight.arrived(), weights_flight.arrived(), index, exchange)

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Rows travel home, then the K of each token are added."""
        exchange = dispatched.exchange
        if not isinstance(exchange, Exchange):
            raise ValueError("these rows were dispatched by another dispatcher: they carry no exchange")
        order_N, inverse_N = exchange.order_N, exchange.inverse_N
        y_ND = all_to_all_rows(y_RD, exchange.recv_rows, exchange.send_rows, self.group)
        stayed = order_N.shape[0] - y_ND.shape[0]
        if stayed:
            y_ND = torch.cat([y_ND, y_ND.new_zeros(stayed, y_ND.shape[1])])
        return unpermute(y_ND, order_N, inverse_N, exchange.top_k, backend=self.backend)
