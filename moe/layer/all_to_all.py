"""Rows from each rank of a group to each other one; differentiable, at once or beside other work."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all_rows(
    x: Tensor, send_rows: tuple[int, ...], recv_rows: tuple[int, ...], group: dist.ProcessGroup
) -> Tensor:
    """Send the first send_rows[0] rows to rank 0 of the group, and so on; differentiable.

    Args:
        x: [sum(send_rows), D].
        send_rows: rows for each rank.
        recv_rows: rows that come from each rank.
        group: the ranks.

    Returns:
        [sum(recv_rows), D], in rank order.
    """
    return RowsInFlight(x, send_rows, recv_rows, group).arrived()


class RowsInFlight:
    """`all_to_all_rows` in two calls: rows leave when it is made; what is computed until `arrived` hides it.

    The gradient hides behind the same work: it leaves in the backward of `arrived`, and is awaited where the
    rows left. Autograd runs the later calls of the forward first, so all between the two runs in between.
    """

    def __init__(
        self, x: Tensor, send_rows: tuple[int, ...], recv_rows: tuple[int, ...], group: dist.ProcessGroup
    ) -> None:
        self._send_rows, self._recv_rows, self._group = send_rows, recv_rows, group
        self._rows: Tensor = _Leave.apply(x, self)  # type: ignore[no-untyped-call]

    def arrived(self) -> Tensor:
        """Wait for the rows; once."""
        leaving = self._rows
        del self._rows  # its graph holds this object: a circle would keep both alive
        rows: Tensor = _Arrive.apply(leaving, self)  # type: ignore[no-untyped-call]
        return rows

    def leave(self, x: Tensor, *, home: bool = False) -> Tensor:
        """Start the exchange, or the one back `home`; what it returns is defined after `wait`."""
        send, recv = (self._recv_rows, self._send_rows) if home else (self._send_rows, self._recv_rows)
        self._sent = x.contiguous()  # must live as long as it is read
        self._out = x.new_empty(sum(recv), x.shape[1])
        self._work = dist.all_to_all_single(
            self._out, self._sent, list(recv), list(send), group=self._group, async_op=True
        )
        return self._out

    def wait(self) -> Tensor:
        """What the exchange brought that was started last; a GPU's stream waits, not the host."""
        self._work.wait()
        out = self._out
        del self._work, self._sent, self._out
        return out


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: RowsInFlight) -> Tensor:
        ctx.flight = flight
        return flight.leave(x)

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.wait(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: RowsInFlight) -> Tensor:
        ctx.flight = flight
        flight.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.flight.leave(grad, home=True)
        return grad, None  # of the rows' shape, as autograd checks; _Leave takes what comes home
