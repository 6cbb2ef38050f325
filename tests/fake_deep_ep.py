"""A double of the package deep_ep, over gloo on the CPU.

It was written from the documentation and source of DeepEP 1.2.1, 2.1.0 and the branch hybrid-ep, and proves
that our carriers keep to what is written there, not that the libraries do. Where a kernel would run on its
own stream the double hands out poison until its event is waited for; where a kernel asserts, it asserts.

`double(api, fault)` gives a module with one of the three classes; `fault` makes it wrong in one way.

Shapes: T tokens, K top-k, E experts, e of this rank, R rows that arrive, N rows with one pair each, D model.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

APIS = ("Buffer", "ElasticBuffer", "HybridEPBuffer")
VERSIONS = {"Buffer": None, "ElasticBuffer": "2.1.0", "HybridEPBuffer": None}
FAULTS = (
    "weights are not returned",
    "experts are off by one rank",
    "combine adds twice",
    "gradients are zero",
    "gradients are of other tokens",
    "weights arrive in another order",
    "the last row is lost",
    "tokens of nowhere are garbage",
)


def double(api: str, fault: str = "") -> ModuleType:
    """A module with the class of one generation."""
    assert api in APIS and fault in ("", *FAULTS), (api, fault)
    module = ModuleType("deep_ep")
    base = {"Buffer": Buffer, "ElasticBuffer": ElasticBuffer, "HybridEPBuffer": HybridEPBuffer}[api]
    setattr(module, api, type(api, (base,), {"fault": fault}))
    if api == "ElasticBuffer":
        module.topk_idx_t = torch.int32  # as built with EP_NUM_TOPK_IDX_BITS=32
    if VERSIONS[api]:
        module.__version__ = VERSIONS[api]
    return module


# ---- rows on their way ------------------------------------------------------------------------------------


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

    def __init__(self, tensors: tuple[Tensor, ...], beside: bool) -> None:
        self.tensors = tensors  # version 2 holds them as long as it lives
        self.values = [(tensor, tensor.clone()) for tensor in tensors] if beside else []
        for tensor, _ in self.values:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

    def current_stream_wait(self) -> None:
        for tensor, value in self.values:
            tensor.detach().copy_(value)  # a kernel that autograd knows nothing of
        self.values = []


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


# ---- DeepEP -----------------------------------------------------------------------------------------------


class _DeepEP:
    """What versions 1 and 2 share."""

    fault = ""
    group: dist.ProcessGroup

    def _first(
        self, x: Tensor, ids_TK: Tensor, weights_TK: Tensor, is_in_rank_TP: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor, Way]:
        check_rows(x)
        assert ids_TK.is_contiguous() and weights_TK.is_contiguous() and weights_TK.dtype == torch.float32
        assert len(x) == len(ids_TK) == len(weights_TK)
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


class Config:
    """Of Buffer: how large its memory must be."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks if num_ranks > 8 else 0


class Buffer(_DeepEP):
    """DeepEP 1."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.group, self.num_nvl_bytes = group, num_nvl_bytes

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64), f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, async_finish: bool = False
    ) -> tuple[Tensor, None, Tensor, Tensor, Event]:
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous()
        ranks = self.group.size()
        is_in_rank_TP = experts_in_ranks(topk_idx, ranks, num_experts // ranks)
        per_expert = topk_idx[topk_idx >= 0].bincount(minlength=num_experts).int()
        return is_in_rank_TP.sum(dim=0).int(), None, per_expert, is_in_rank_TP, Event((), False)

    def dispatch(
        self,
        x: Tensor,
        *,
        handle: Way | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        async_finish: bool = False,
    ) -> tuple[Any, ...]:
        assert x.shape[1] * 2 * self.group.size() <= self.num_nvl_bytes
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            x_RD = self._again(x, handle)
            return x_RD, None, None, None, None, Event((x_RD,), async_finish)
        assert topk_idx is not None and topk_weights is not None and is_token_in_rank is not None
        assert num_tokens_per_rank is not None and num_tokens_per_rank.dtype == torch.int32
        assert num_tokens_per_expert is not None and num_tokens_per_expert.dtype == torch.int32
        assert torch.equal(num_tokens_per_rank, is_token_in_rank.sum(dim=0).int())
        x_RD, ids_RK, weights_RK, way = self._first(
            x, topk_idx, topk_weights, is_token_in_rank, len(num_tokens_per_expert)
        )
        per_rank = len(num_tokens_per_expert) // self.group.size()
        counts_e = ids_RK[ids_RK >= 0].bincount(minlength=per_rank).tolist()
        event = Event((x_RD, ids_RK, weights_RK), async_finish)
        return x_RD, ids_RK, weights_RK, counts_e, way, event

    def combine(
        self, x: Tensor, handle: Way, topk_weights: Tensor | None = None, async_finish: bool = False
    ) -> tuple[Tensor, Tensor | None, Event]:
        return *self._home(x, handle, topk_weights), Event((), False)


@dataclass(frozen=True)
class EPHandle:
    """Of ElasticBuffer."""

    way: Way
    num_experts: int
    num_sms: int


class ElasticBuffer(_DeepEP):
    """DeepEP 2."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        deterministic: bool = False,
    ) -> None:
        assert hidden % 256 == 0, hidden
        self.group, self.most, self.hidden, self.num_topk = group, num_max_tokens_per_rank, hidden, num_topk

    def dispatch(
        self,
        x: Tensor,
        *,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int | None = None,
        num_sms: int = 0,
        async_with_compute_stream: bool = False,
        handle: EPHandle | None = None,
    ) -> tuple[Any, ...]:
        assert len(x) <= self.most and x.shape[1] == self.hidden
        if handle is not None:
            assert topk_idx is None and num_sms, "num_experts is None where the share of SMs is worked out"
            x_RD = self._again(x, handle.way)
            return x_RD, None, None, handle, Event((x_RD,), async_with_compute_stream)
        assert topk_idx is not None and topk_weights is not None and num_experts is not None
        assert topk_idx.dtype == torch.int32 and topk_idx.shape[1] == self.num_topk
        ranks = self.group.size()
        is_in_rank_TP = experts_in_ranks(topk_idx, ranks, num_experts // ranks)
        x_RD, ids_RK, weights_RK, way = self._first(x, topk_idx, topk_weights, is_in_rank_TP, num_experts)
        event = Event((x_RD, ids_RK, weights_RK), async_with_compute_stream)
        return x_RD, ids_RK, weights_RK, EPHandle(way, num_experts, 6), event

    def combine(
        self, x: Tensor, handle: EPHandle, topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Event]:
        return *self._home(x, handle.way, topk_weights), Event((), False)


# ---- HybridEP ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Permuted:
    """How the rows of one dispatch travel and are copied for each expert here."""

    way: Way
    row_N: Tensor
    expert_N: Tensor
    num_experts: int


class HybridEPBuffer(_DeepEP):
    """The branch hybrid-ep."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
    ) -> None:
        assert hidden_dim % 16 == 0 and num_local_experts * group.size() % 4 == 0
        self.group, self.most = group, max_num_of_tokens_per_rank

    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        num_of_experts_per_rank: int | None = None,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        num_permuted_tokens: int | None = None,
        handle: Permuted | None = None,
    ) -> tuple[Any, ...]:
        check_rows(hidden)
        if handle is not None:
            assert num_permuted_tokens is not None, "an int64 of C++ takes no None"
            x_ND = self._again(hidden, handle.way)[handle.row_N]
            assert len(x_ND) == num_permuted_tokens
            return x_ND, None, None, None, handle
        assert routing_map is not None and probs is not None and num_of_experts_per_rank is not None
        assert routing_map.dtype == torch.bool and probs.dtype == torch.float32 and probs.is_contiguous()
        assert len(routing_map) == len(probs) == len(hidden) <= self.most and routing_map.is_contiguous()
        self._check_even(len(hidden))
        rank, ranks, e = self.group.rank(), self.group.size(), num_of_experts_per_rank
        way = Way.of(routing_map.view(len(hidden), ranks, e).any(dim=2), self.group)
        if self.fault == "experts are off by one rank":
            rank = (rank + 1) % ranks
        here = slice(rank * e, (rank + 1) * e)
        expert_N, row_N = way.there(routing_map)[:, here].t().nonzero(as_tuple=True)
        weights_N = way.there(probs)[:, here][row_N, expert_N]
        x_ND = way.there(hidden)[row_N]
        if self.fault == "weights arrive in another order":
            weights_N = weights_N.flip(0)
        if self.fault == "the last row is lost" and len(x_ND):
            x_ND[-1] = 0
        counts_e = expert_N.bincount(minlength=e)
        return x_ND, weights_N, None, counts_e, Permuted(way, row_N, expert_N + here.start, ranks * e)

    def combine_with_unpermute(
        self, *, hidden: Tensor, probs: Tensor | None = None, handle: Permuted
    ) -> tuple[Tensor, Tensor | None]:
        check_rows(hidden)
        rows = sum(handle.way.recv_rows)
        y_RD = torch.zeros(rows, hidden.shape[1]).index_add(0, handle.row_N, hidden.float())
        if probs is None:
            return self._home(y_RD.to(hidden.dtype), handle.way, None)
        assert probs.dim() == 1 and probs.dtype == torch.float32
        probs_RE = torch.zeros(rows, handle.num_experts)
        probs_RE[handle.row_N, handle.expert_N] = probs
        return self._home(y_RD.to(hidden.dtype), handle.way, probs_RE)

    def _check_even(self, num_tokens: int) -> None:
        """Routing maps are gathered into one, so all ranks must have as many tokens."""
        numbers: list[int] = [0] * self.group.size()
        dist.all_gather_object(numbers, num_tokens, group=self.group)
        assert len(set(numbers)) == 1, numbers
