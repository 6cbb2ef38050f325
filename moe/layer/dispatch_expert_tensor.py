"""Expert tensor parallelism: the ranks of a group each have a slice of the hidden size F of the same experts.

It goes around any dispatcher:
1. dispatch  when its rows have arrived, each rank of the group gets those of all
2. compute   partial outputs, sums over a slice of F   experts.py
3. combine   each rank gets the partial outputs of its rows from all and adds them; then the dispatcher's own

Ranks have unequal numbers of rows, so both ways are all-to-alls: the bytes of an all-gather and of a
reduce-scatter, and sums in fp32 in rank order, which give equal bits in every run. Gradients go the same ways
back: those of rows and combine weights are sums over the group.

Shapes: n ranks of the group, R rows that the dispatcher gave this one, K pairs of each, D model.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moe.kernels.permute_index import permute_index
from moe.layer.all_to_all import RowsInFlight, all_to_all_rows
from moe.layer.dispatch import Arrive, Dispatcher, LocalDispatcher
from moe.layer.types import Dispatched, Gathered, Routing


class ExpertTensorDispatcher(Dispatcher):
    """Shares the rows of `inner` among the ranks that split its experts, and sums their partial outputs.

    A GPU waits for the host once more in each forward, for the numbers of rows.
    """

    def __init__(self, inner: Dispatcher, group: dist.ProcessGroup, *, backend: str = "auto") -> None:
        self.inner = inner
        self.group = group
        self.backend = backend

    def start(self, x_TD: Tensor, routing: Routing) -> Arrive:
        """Rows leave for the group when those of `inner` have arrived; at once where it moves none."""
        arrive = self.inner.start(x_TD, routing)
        if isinstance(self.inner, LocalDispatcher):
            return _Copies(arrive(), self.group, self.backend).arrived
        return lambda: _Copies(arrive(), self.group, self.backend).arrived()

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Add the partial outputs of this rank's rows, then `inner`'s combine."""
        gathered = dispatched.exchange
        if not isinstance(gathered, Gathered):
            raise ValueError("these rows were dispatched by another dispatcher: no group has gathered them")
        rows, ranks = len(gathered.own.x_RD), len(gathered.rows)
        partial = all_to_all_rows(y_RD, gathered.rows, (rows,) * ranks, self.group)
        y_RD = partial.view(ranks, rows, y_RD.shape[1]).sum(dim=0)
        return self.inner.combine(y_RD, gathered.own)


class _Copies:
    """This rank's rows, their weights and expert ids on the way to every rank of the group."""

    def __init__(self, own: Dispatched, group: dist.ProcessGroup, backend: str) -> None:
        self._own = own
        self._backend = backend
        ranks, own_rows = group.size(), len(own.x_RD)
        rows_n = own.index[1].new_empty(ranks)
        dist.all_gather_into_tensor(rows_n, rows_n.new_full((1,), own_rows), group=group)
        self._rows = tuple(rows_n.tolist())
        travelling = (own.x_RD, own.weights_RK, _expert_ids(own))
        self._flights = [
            RowsInFlight(x.repeat(ranks, 1), (own_rows,) * ranks, self._rows, group) for x in travelling
        ]

    def arrived(self) -> Dispatched:
        """The rows of all ranks, in rank order."""
        x_RD, weights_RK, ids_RK = (flight.arrived() for flight in self._flights)
        num_experts = self._own.index[2].shape[0]
        index = permute_index(ids_RK.flatten(), num_experts, backend=self._backend)
        return Dispatched(x_RD, weights_RK, index, Gathered(self._own, self._rows))


def _expert_ids(dispatched: Dispatched) -> Tensor:
    """The experts that the index was sorted by, [R, K]; their number for pairs of none."""
    _, inverse_N, ends_e = dispatched.index
    ids_N = torch.searchsorted(ends_e.to(inverse_N.dtype), inverse_N, right=True)
    return ids_N.view(dispatched.weights_RK.shape)
