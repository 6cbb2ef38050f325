"""Dispatch by a CUDA library: rows leave once for each (token, rank), and come home as one sum.

A `Carrier` is one library with its buffers, DeepEP or HybridEP; this file makes a Dispatcher of it, with
gradients: that of sending rows is bringing them home, and the reverse. The experts apply the weights.

No carrier has met its library where this was written, for want of a GPU. They follow its documentation and
source, tests run them on a double, and dispatch_check.py compares a made-up batch before every run.

Shapes: T tokens, K top-k, R rows that arrive, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe.kernels.permute_index import permute_index
from moe.layer.dispatch import Arrive, Dispatcher
from moe.layer.types import Carried, Dispatched, Routing

# Both libraries sum at home in this type alone.
ROW_DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class ExchangeSizes:
    """What a library's buffers are made for.

    Attributes:
        hidden_size: D.
        num_experts: over all ranks of the group.
        top_k: K.
        tokens_per_rank: the most that one rank sends at once; the same on every rank.
    """

    hidden_size: int
    num_experts: int
    top_k: int
    tokens_per_rank: int


@dataclass(frozen=True)
class Sent:
    """Beside the rows, what a carrier says of a departure."""

    ids_RK: Tensor  # int, experts of this rank from 0, negative for those elsewhere; to be read after `wait`
    handle: Any
    wait: Callable[[], None]  # until then rows, weights and ids may be on their way


class Carrier(Protocol):
    """A library that moves rows between the ranks of a group. All calls are collective."""

    name: str  # with its version, for people

    def send(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Sent]:
        """x_RD and weights_RK, defined after `Sent.wait`.

        Args:
            x_TD: bf16, contiguous.
            ids_TK: int64 over all ranks, -1 for none.
            weights_TK: fp32, contiguous.
        """
        ...

    def send_again(self, x_TD: Tensor, handle: Any) -> Tensor:
        """Other rows the way of the first ones, defined at once."""
        ...

    def bring_home(
        self, y_RD: Tensor, handle: Any, weights_RK: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The sum at each token of the rows that it sent, and of each pair's weights."""
        ...

    def close(self) -> None:
        """Free the buffers, while the process group still stands: ranks meet here. Nothing moves after it."""
        ...


class FusedDispatcher(Dispatcher):
    """Experts are split over the carrier's group in rank order."""

    def __init__(self, carrier: Carrier, num_local_experts: int, *, backend: str = "auto") -> None:
        self.carrier = carrier
        self.num_local_experts = num_local_experts
        self.backend = backend

    def start(self, x_TD: Tensor, routing: Routing) -> Arrive:
        """Rows leave beside what is computed until they are awaited; a host waits for their number.

        Raises:
            ValueError: if rows are not bf16.
        """
        if x_TD.dtype != ROW_DTYPE:
            raise ValueError(f"{self.carrier.name} sums rows in bf16 only, these are {x_TD.dtype}")
        x_RD, weights_RK, sent = _Send.apply(  # type: ignore[no-untyped-call]
            x_TD, routing.weights_TK.float(), routing.ids_TK, self.carrier
        )

        def arrive() -> Dispatched:
            with torch.no_grad():  # DeepEP 2 sorts the rows in place here, which is no part of the graph
                sent.wait()
            index = permute_index(sent.ids_RK.long().flatten(), self.num_local_experts, backend=self.backend)
            return Dispatched(x_RD, weights_RK, index, Carried(sent.handle))

        return arrive

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Rows travel home and are added there."""
        carried = dispatched.exchange
        if not isinstance(carried, Carried):
            raise ValueError("these rows were dispatched by another dispatcher: no library carried them")
        y_TD: Tensor = _BringHome.apply(y_RD, carried.handle, self.carrier)  # type: ignore[no-untyped-call]
        return y_TD


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, carrier: Carrier
    ) -> tuple[Tensor, Tensor, Sent]:
        x_RD, weights_RK, sent = carrier.send(x_TD.contiguous(), ids_TK, weights_TK.contiguous())
        # Not `sent`: its event may hold the rows, whose graph holds this context.
        ctx.carrier, ctx.handle = carrier, sent.handle
        return x_RD, weights_RK, sent

    @staticmethod
    def backward(
        ctx: Any, grad_x_RD: Tensor, grad_weights_RK: Tensor, _sent: None
    ) -> tuple[Tensor, Tensor | None, None, None]:
        # Weights are summed over all ranks that a token went to: those of experts elsewhere have no gradient.
        grad_x_TD, grad_weights_TK = ctx.carrier.bring_home(
            grad_x_RD.contiguous(), ctx.handle, grad_weights_RK.contiguous()
        )
        return grad_x_TD, grad_weights_TK, None, None


class _BringHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, handle: Any, carrier: Carrier) -> Tensor:
        ctx.carrier, ctx.handle = carrier, handle
        y_TD, _ = carrier.bring_home(y_RD.contiguous(), handle)
        return y_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        return ctx.carrier.send_again(grad_TD.contiguous(), ctx.handle), None, None
