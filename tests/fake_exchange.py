"""How rows travel in the double of deep_ep: what its three classes share, and how they can be wrong.

Shapes: T tokens, K top-k, E experts, R rows that arrive, A rows that leave, P ranks, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FAULTS = (
    "weights are not returned",
    "experts are off by one rank",
    "combine adds twice",
    "gradients are zero",
    "gradients are of other tokens",
    "weights arrive in another order",
    "the last row is lost",
    "tokens of nowhere are garbage",
    "the handle is that of the newest dispatch",
)


@dataclass(frozen=True)
class Way:
    """How the rows of one dispatch travel."""

    group: dist.ProcessGroup
    is_in_rank_TP: Tensor
    send_rows: list[int]
    recv_rows: list[int]

    @classmethod
    def of(cls, is_in_rank_TP: Tensor, group: dist.ProcessGroup) -> Way:
        send_P = is_in_rank_TP.sum(dim=0)
        recv_P = torch.empty_like(send_P)
        dist.all_to_all_single(recv_P, send_P, group=group)
        return cls(group, is_in_rank_TP, send_P.tolist(), recv_P.tolist())

    def there(self, rows_T: Tensor) -> Tensor:
        """Each token's row to each rank that it goes to."""
        token_A = self.is_in_rank_TP.t().nonzero()[:, 1]
        return self._exchange(rows_T[token_A], self.send_rows, self.recv_rows)

    def home(self, rows_R: Tensor) -> Tensor:
        """Added at each token in fp32."""
        rows_A = self._exchange(rows_R, self.recv_rows, self.send_rows)
        out_T = torch.zeros(len(self.is_in_rank_TP), rows_R.shape[1])
        token_A = self.is_in_rank_TP.t().nonzero()[:, 1]
        return out_T.index_add(0, token_A, rows_A.float()).to(rows_R.dtype)

    def _exchange(self, rows: Tensor, send: list[int], recv: list[int]) -> Tensor:
        assert rows.dim() == 2 and len(rows) == sum(send), f"{tuple(rows.shape)} for {send}"
        out = rows.new_empty(sum(recv), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), recv, send, group=self.group)
        return out


class Event:
    """Of a kernel on its own stream: what it writes is poison before the wait, if it runs beside others."""

    def __init__(
        self, tensors: tuple[Tensor, ...], beside: bool, after: Callable[[], None] | None = None
    ) -> None:
        self.tensors = tensors  # version 2 holds them as long as it lives
        self.after = after
        self.values = [(tensor, tensor.clone()) for tensor in tensors] if beside else []
        for tensor, _ in self.values:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

    def current_stream_wait(self) -> None:
        for tensor, value in self.values:
            tensor.detach().copy_(value)  # a kernel that autograd knows nothing of
        self.values = []
        if self.after is not None:
            self.after()
            self.after = None


def check_rows(x: Tensor) -> None:
    assert x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16, (x.shape, x.dtype)
    assert x.shape[1] * 2 % 16 == 0, x.shape


def local_ids(ids_TK: Tensor, rank: int, per_rank: int) -> Tensor:
    here_TK = (ids_TK >= rank * per_rank) & (ids_TK < (rank + 1) * per_rank)
    return torch.where(here_TK, ids_TK - rank * per_rank, -1)


def experts_in_ranks(ids_TK: Tensor, ranks: int, per_rank: int) -> Tensor:
    """Whether a token goes to a rank: [T, ranks]."""
    table_TP = torch.zeros(len(ids_TK), ranks + 1, dtype=torch.bool)
    rank_TK = torch.where(ids_TK >= 0, ids_TK // per_rank, ranks)
    return table_TP.scatter_(1, rank_TK.long(), True)[:, :ranks].contiguous()


class ExchangeBuffer:
    """What all three share."""

    fault = ""
    freed: list[bool]  # of each buffer that was freed, whether its ranks could still meet
    sends: list[int]  # how many tokens left in each dispatch with new routing
    group: dist.ProcessGroup
    explicitly_destroy = False
    newest: Any

    def _kept(self, handle: Any) -> Any:
        """A new handle."""
        self.newest = handle
        return handle

    def _given(self, handle: Any) -> Any:
        """A handle that comes back."""
        return self.newest if self.fault == "the handle is that of the newest dispatch" else handle

    def _free(self) -> None:
        self.freed.append(dist.is_initialized())
        assert dist.is_initialized(), "buffers are freed after the process group"

    def __del__(self) -> None:
        if not self.explicitly_destroy:
            self._free()

    def destroy(self) -> None:
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"
        self._free()

    def _first(
        self, x: Tensor, ids_TK: Tensor, weights_TK: Tensor, is_in_rank_TP: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor, Way]:
        check_rows(x)
        assert ids_TK.is_contiguous() and weights_TK.is_contiguous() and weights_TK.dtype == torch.float32
        assert len(x) == len(ids_TK) == len(weights_TK)
        self.sends.append(len(x))
        way = Way.of(is_in_rank_TP, self.group)
        per_rank = num_experts // self.group.size()
        ids_RK = local_ids(way.there(ids_TK), self.group.rank(), per_rank)
        weights_RK = way.there(weights_TK).masked_fill(ids_RK < 0, 0.0)
        x_RD = way.there(x)
        if self.fault == "experts are off by one rank":  # those of the next rank are taken for its own
            ids_RK = local_ids(way.there(ids_TK), (self.group.rank() + 1) % self.group.size(), per_rank)
        if self.fault == "weights arrive in another order":
            weights_RK = weights_RK.flip(1)
        if self.fault == "the last row is lost" and len(x_RD):
            x_RD[-1] = 0
        return x_RD, ids_RK, weights_RK, way

    def _again(self, x: Tensor, way: Way) -> Tensor:
        check_rows(x)
        assert len(x) == len(way.is_in_rank_TP), len(x)
        x_RD = way.there(x)
        if self.fault == "gradients are zero":
            x_RD.zero_()
        if self.fault == "gradients are of other tokens":
            x_RD = x_RD.roll(1, dims=0)
        return x_RD

    def _home(self, x: Tensor, way: Way, weights_RK: Tensor | None) -> tuple[Tensor, Tensor | None]:
        check_rows(x)
        y_TD = way.home(x)
        nowhere_T1 = ~way.is_in_rank_TP.any(dim=1, keepdim=True)
        if self.fault == "combine adds twice":
            y_TD = y_TD + y_TD
        if self.fault == "tokens of nowhere are garbage":
            y_TD = y_TD.masked_fill(nowhere_T1, 1e3)
        if weights_RK is None:
            return y_TD, None
        assert weights_RK.is_contiguous() and weights_RK.dtype == torch.float32
        weights_TK = way.home(weights_RK)
        return y_TD, torch.zeros_like(weights_TK) if self.fault == "weights are not returned" else weights_TK
