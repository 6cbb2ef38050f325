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
from fake_exchange import FAULTS, Event, ExchangeBuffer, Way, check_rows, experts_in_ranks
from torch import Tensor

APIS = ("Buffer", "ElasticBuffer", "HybridEPBuffer")
VERSIONS = {"Buffer": None, "ElasticBuffer": "2.1.0", "HybridEPBuffer": None}


def double(api: str, fault: str = "") -> ModuleType:
    """A module with the class of one generation."""
    assert api in APIS and fault in ("", *FAULTS), (api, fault)
    module = ModuleType("deep_ep")
    base = {"Buffer": Buffer, "ElasticBuffer": ElasticBuffer, "HybridEPBuffer": HybridEPBuffer}[api]
    setattr(module, api, type(api, (base,), {"fault": fault, "freed": [], "sends": []}))
    if api == "ElasticBuffer":
        module.topk_idx_t = torch.int32  # as built with EP_NUM_TOPK_IDX_BITS=32
    if VERSIONS[api]:
        module.__version__ = VERSIONS[api]
    return module


# ---- DeepEP -----------------------------------------------------------------------------------------------


class Config:
    """Of Buffer: how large its memory must be."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks if num_ranks > 8 else 0


class Buffer(ExchangeBuffer):
    """DeepEP 1."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        explicitly_destroy: bool = False,
    ) -> None:
        self.group, self.num_nvl_bytes, self.explicitly_destroy = group, num_nvl_bytes, explicitly_destroy

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        served = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
        assert num_ranks in served, f"Unsupported number of EP ranks: {num_ranks}"
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
            x_RD = self._again(x, self._given(handle))
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
        return x_RD, ids_RK, weights_RK, counts_e, self._kept(way), event

    def combine(
        self, x: Tensor, handle: Way, topk_weights: Tensor | None = None, async_finish: bool = False
    ) -> tuple[Tensor, Tensor | None, Event]:
        return *self._home(x, self._given(handle), topk_weights), Event((), False)


def check_torch_deterministic() -> None:
    filled = torch.utils.deterministic.fill_uninitialized_memory
    assert not (torch.are_deterministic_algorithms_enabled() and filled)


@dataclass(frozen=True)
class EPHandle:
    """Of ElasticBuffer."""

    way: Way
    num_experts: int
    num_sms: int


class ElasticBuffer(ExchangeBuffer):
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
        explicitly_destroy: bool = False,
    ) -> None:
        assert hidden % 256 == 0, hidden
        assert deterministic, "the double knows no other order"
        self.explicitly_destroy = explicitly_destroy
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
        check_torch_deterministic()
        assert len(x) <= self.most and x.shape[1] == self.hidden
        if handle is not None:
            assert topk_idx is None and num_sms, "num_experts is None where the share of SMs is worked out"
            x_RD = self._again(x, self._given(handle).way)
            return x_RD, None, None, handle, self._unsorted((x_RD,), async_with_compute_stream)
        assert topk_idx is not None and topk_weights is not None and num_experts is not None
        assert topk_idx.dtype == torch.int32 and topk_idx.shape[1] == self.num_topk
        ranks = self.group.size()
        is_in_rank_TP = experts_in_ranks(topk_idx, ranks, num_experts // ranks)
        x_RD, ids_RK, weights_RK, way = self._first(x, topk_idx, topk_weights, is_in_rank_TP, num_experts)
        event = self._unsorted((x_RD, ids_RK, weights_RK), async_with_compute_stream)
        return x_RD, ids_RK, weights_RK, self._kept(EPHandle(way, num_experts, 6)), event

    def _unsorted(self, rows: tuple[Tensor, ...], beside: bool) -> Event:
        """Rows arrive in any order, and whoever waits sorts them, with operations that autograd sees."""
        order_R = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(len(rows[0])))
        for tensor in rows:
            tensor.copy_(tensor[order_R])

        def sort() -> None:
            for tensor in rows:
                sorted_ = tensor[order_R.argsort()]
                tensor.copy_(sorted_)

        if beside:
            return Event(rows, beside, after=sort)
        sort()
        return Event((), False)

    def combine(
        self, x: Tensor, handle: EPHandle, topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Event]:
        check_torch_deterministic()
        return *self._home(x, self._given(handle).way, topk_weights), Event((), False)


# ---- HybridEP ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Permuted:
    """How the rows of one dispatch travel and are copied for each expert here."""

    way: Way
    row_N: Tensor
    expert_N: Tensor
    num_experts: int


class HybridEPBuffer(ExchangeBuffer):
    """The branch hybrid-ep."""

    ranks_per_domain = 0  # with NVLink among them; 0 is all

    def __init__(
        self,
        group: dist.ProcessGroup,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
    ) -> None:
        domain = self.ranks_per_domain or group.size()
        assert group.size() % domain == 0, (
            f"The number of ranks {group.size()} should be divisible by the number of ranks per node {domain}"
        )
        if hidden_dim % 16 or num_local_experts * domain % 4:
            raise RuntimeError("The buffer config is not valid.")
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
            handle = self._given(handle)
            x_ND = self._again(hidden, handle.way)[handle.row_N]
            assert len(x_ND) == num_permuted_tokens
            return x_ND, None, None, None, handle
        assert routing_map is not None and probs is not None and num_of_experts_per_rank is not None
        assert routing_map.dtype == torch.bool and probs.dtype == torch.float32 and probs.is_contiguous()
        assert len(routing_map) == len(probs) == len(hidden) <= self.most and routing_map.is_contiguous()
        self._check_even(len(hidden))
        self.sends.append(len(hidden))
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
        permuted = Permuted(way, row_N, expert_N + here.start, ranks * e)
        return x_ND, weights_N, None, counts_e, self._kept(permuted)

    def combine_with_unpermute(
        self, *, hidden: Tensor, probs: Tensor | None = None, handle: Permuted
    ) -> tuple[Tensor, Tensor | None]:
        check_rows(hidden)
        handle = self._given(handle)
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
