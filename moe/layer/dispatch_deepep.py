"""DeepEP as a carrier of rows: its class Buffer (version 1) and its class ElasticBuffer (version 2).

From its documentation and source (github.com/deepseek-ai/DeepEP, v1.2.1 and main at 2.1.0). In both a row
goes once to each rank that holds experts of its token, with the ids there (-1 for experts elsewhere) and the
weights (0 there); at home rows are added in fp32 and rounded to bf16, without weights. Between
nodes version 2 may round the sum of a node's rows, too.

Shapes: moe/layer/dispatch_fused.py.
"""

from __future__ import annotations

import platform
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.errors import InputError
from moe.layer.dispatch_fused import ExchangeSizes, Sent

# What is called, with the arguments that are given by name.
BUFFER_API = {
    "Buffer.__init__": ("group", "num_nvl_bytes", "num_rdma_bytes", "explicitly_destroy"),
    "Buffer.get_dispatch_config": (),
    "Buffer.get_combine_config": (),
    "Buffer.get_dispatch_layout": ("topk_idx", "num_experts"),
    "Buffer.dispatch": (
        "x",
        "handle",
        "num_tokens_per_rank",
        "num_tokens_per_rdma_rank",
        "is_token_in_rank",
        "num_tokens_per_expert",
        "topk_idx",
        "topk_weights",
        "async_finish",
    ),
    "Buffer.combine": ("x", "handle", "topk_weights"),
    "Buffer.destroy": (),
}
ELASTIC_API = {
    "ElasticBuffer.__init__": (
        "group",
        "num_max_tokens_per_rank",
        "hidden",
        "num_topk",
        "deterministic",
        "explicitly_destroy",
    ),
    "ElasticBuffer.dispatch": (
        "x",
        "topk_idx",
        "topk_weights",
        "num_experts",
        "num_sms",
        "async_with_compute_stream",
        "handle",
    ),
    "ElasticBuffer.combine": ("x", "handle", "topk_weights"),
    "ElasticBuffer.destroy": (),
}
# Kernels copy vectors of 16 bytes; those between nodes, and all of version 2, by a warp: 32 at once.
VECTOR_BYTES, WARP = 16, 32
NVLINK_RANKS = 8  # Buffer takes every 8 neighbours of the group for a node
MOST_RANKS = 160  # that Buffer has settings for


class BufferCarrier:
    """deep_ep.Buffer, of version 1 and left in version 2; see Carrier."""

    def __init__(
        self, deep_ep: ModuleType, group: dist.ProcessGroup, sizes: ExchangeSizes, name: str
    ) -> None:
        """Make the buffers; collective.

        Args:
            deep_ep: the package.
            group: expert-parallel ranks.
            sizes: of an exchange.
            name: for people.

        Raises:
            InputError: the library has no kernels for such a group or such rows.
        """
        self.name = name
        self._num_experts = sizes.num_experts
        self._id_dtype = _id_dtype(deep_ep)
        configs = _configs(deep_ep, group.size(), name)
        _require_whole_nodes(group, name)
        _require_rows(sizes.hidden_size, WARP if group.size() > NVLINK_RANKS else 1, name)
        row_bytes = 2 * sizes.hidden_size
        self._buffer = deep_ep.Buffer(
            group=group,
            num_nvl_bytes=max(config.get_nvl_buffer_size_hint(row_bytes, group.size()) for config in configs),
            num_rdma_bytes=max(
                config.get_rdma_buffer_size_hint(row_bytes, group.size()) for config in configs
            ),
            explicitly_destroy=True,
        )

    def send(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Sent]:
        """See Carrier."""
        ids_TK = ids_TK.to(self._id_dtype).contiguous()
        per_rank, per_rdma_rank, per_expert, is_in_rank, _ = self._buffer.get_dispatch_layout(
            topk_idx=ids_TK, num_experts=self._num_experts
        )
        x_RD, ids_RK, weights_RK, _, handle, event = self._buffer.dispatch(
            x=x_TD,
            topk_idx=ids_TK,
            topk_weights=weights_TK,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            async_finish=True,
        )
        return x_RD, weights_RK, Sent(ids_RK, handle, event.current_stream_wait)

    def send_again(self, x_TD: Tensor, handle: Any) -> Tensor:
        """See Carrier."""
        x_RD: Tensor = self._buffer.dispatch(x=x_TD, handle=handle)[0]
        return x_RD

    def bring_home(
        self, y_RD: Tensor, handle: Any, weights_RK: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See Carrier."""
        y_TD, weights_TK, _ = self._buffer.combine(x=y_RD, handle=handle, topk_weights=weights_RK)
        return y_TD, weights_TK

    def close(self) -> None:
        """See Carrier."""
        self._buffer.destroy()


class ElasticCarrier:
    """deep_ep.ElasticBuffer, of version 2; see Carrier."""

    def __init__(
        self, deep_ep: ModuleType, group: dist.ProcessGroup, sizes: ExchangeSizes, name: str
    ) -> None:
        """As BufferCarrier."""
        self.name = name
        self._sizes = sizes
        self._id_dtype = _id_dtype(deep_ep)
        _require_rows(sizes.hidden_size, WARP, name)
        self._buffer = deep_ep.ElasticBuffer(
            group=group,
            num_max_tokens_per_rank=sizes.tokens_per_rank,
            hidden=sizes.hidden_size,
            num_topk=sizes.top_k,
            deterministic=True,  # rows arrive in one order, so that runs give equal bits
            explicitly_destroy=True,
        )

    def send(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Sent]:
        """See Carrier."""
        x_RD, ids_RK, weights_RK, handle, event = self._buffer.dispatch(
            x=x_TD,
            topk_idx=ids_TK.to(self._id_dtype).contiguous(),
            topk_weights=weights_TK,
            num_experts=self._sizes.num_experts,
            async_with_compute_stream=True,
        )
        return x_RD, weights_RK, Sent(ids_RK, handle, event.current_stream_wait)

    def send_again(self, x_TD: Tensor, handle: Any) -> Tensor:
        """See Carrier."""
        # Left to itself it works out its share of SMs from a number of experts that it looks up only later.
        x_RD: Tensor = self._buffer.dispatch(x=x_TD, handle=handle, num_sms=handle.num_sms)[0]
        return x_RD

    def bring_home(
        self, y_RD: Tensor, handle: Any, weights_RK: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See Carrier."""
        y_TD, weights_TK, _ = self._buffer.combine(x=y_RD, handle=handle, topk_weights=weights_RK)
        return y_TD, weights_TK

    def close(self) -> None:
        """See Carrier."""
        self._buffer.destroy()


def _id_dtype(deep_ep: ModuleType) -> torch.dtype:
    """Version 2 may be built for 32 bits."""
    dtype: torch.dtype = getattr(deep_ep, "topk_idx_t", torch.int64)
    return dtype


def _configs(deep_ep: ModuleType, ranks: int, name: str) -> tuple[Any, Any]:
    try:
        return deep_ep.Buffer.get_dispatch_config(ranks), deep_ep.Buffer.get_combine_config(ranks)
    except AssertionError as error:
        served = ", ".join(str(n) for n in range(2, MOST_RANKS + 1) if _is_served(deep_ep, n))
        raise InputError(
            f"{name} has no kernels for parallel.ep={ranks} ({error}); use one of {served}, "
            "or parallel.dispatcher=hierarchical or alltoall"
        ) from error


def _is_served(deep_ep: ModuleType, ranks: int) -> bool:
    try:
        deep_ep.Buffer.get_dispatch_config(ranks)
        deep_ep.Buffer.get_combine_config(ranks)
    except AssertionError:
        return False
    return True


def _require_whole_nodes(group: dist.ProcessGroup, name: str) -> None:
    machines = [""] * group.size()
    dist.all_gather_object(machines, platform.node(), group=group)
    for first in range(0, len(machines), NVLINK_RANKS):
        node = machines[first : first + NVLINK_RANKS]
        if len(set(node)) > 1:
            raise InputError(
                f"{name} takes ranks {first} to {first + len(node) - 1} of an expert group for one node with "
                f"NVLink, but they run on {', '.join(sorted(set(node)))}; use a parallel.ep that fills nodes "
                f"of {NVLINK_RANKS} GPUs or lies in one (with parallel.etp above 1 only the latter: "
                f"parallel.ep of at most {NVLINK_RANKS} / parallel.etp), whole experts, parallel.etp=1, or "
                "parallel.dispatcher=hierarchical or alltoall"
            )


def _require_rows(hidden_size: int, vectors: int, name: str) -> None:
    multiple = vectors * VECTOR_BYTES // 2
    if hidden_size % multiple:
        raise InputError(
            f"{name} moves rows of a multiple of {multiple} numbers, and model.hidden_size={hidden_size}; "
            "use parallel.dispatcher=hierarchical or alltoall"
        )
