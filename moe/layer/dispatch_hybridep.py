"""HybridEP as a carrier of rows: the class HybridEPBuffer of DeepEP's branch hybrid-ep.

From its source and NVIDIA's use of it in Megatron-LM. A row goes once to each rank and is copied there for
each of its experts, in expert order, so that rows arrive with one pair each. Every rank must send the same
number of tokens: fewer are filled up with tokens that go nowhere.

Shapes: moe/layer/dispatch_fused.py; P tokens with those that fill up, E experts, e experts of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.errors import InputError
from moe.layer.dispatch_fused import ExchangeSizes, Sent

# What is called, with the arguments that are given.
HYBRID_API = {
    "HybridEPBuffer.__init__": ("group", "hidden_dim", "max_num_of_tokens_per_rank", "num_local_experts"),
    "HybridEPBuffer.dispatch_with_permute": (
        "hidden",
        "routing_map",
        "probs",
        "num_of_experts_per_rank",
        "num_permuted_tokens",
        "handle",
    ),
    "HybridEPBuffer.combine_with_unpermute": ("hidden", "probs", "handle"),
}
# Kernels work in chunks of so many tokens, and copy rows of a multiple of so many numbers.
CHUNK_TOKENS, ROW_MULTIPLE = 64, 16
# The ranks of an NVLink domain, which the library finds out itself, hold a multiple of so many experts.
EXPERT_MULTIPLE = 4
# What it says of a group that is not whole domains, and of another number of experts.
REFUSALS = ("should be divisible by the number of ranks", "buffer config is not valid")


@dataclass(frozen=True)
class _Journey:
    handle: Any  # the library's
    num_rows: int  # that arrived here
    ids_TK: Tensor  # that left here


class HybridCarrier:
    """See Carrier."""

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
            InputError: the library has no kernels for such rows, or so many experts, or such a group.
        """
        if sizes.hidden_size % ROW_MULTIPLE:
            raise InputError(
                f"{name} moves rows of a multiple of {ROW_MULTIPLE} numbers, and model.hidden_size="
                f"{sizes.hidden_size}; use parallel.dispatcher=hierarchical or alltoall"
            )
        self.name = name
        self._num_experts = sizes.num_experts
        self._num_local_experts = sizes.num_experts // group.size()
        self._num_tokens = -(-sizes.tokens_per_rank // CHUNK_TOKENS) * CHUNK_TOKENS
        try:
            self._buffer = deep_ep.HybridEPBuffer(
                group=group,
                hidden_dim=sizes.hidden_size,
                max_num_of_tokens_per_rank=self._num_tokens,
                num_local_experts=self._num_local_experts,
            )
        except (AssertionError, RuntimeError) as error:
            if not any(words in str(error) for words in REFUSALS):
                raise
            raise InputError(
                f"{name} refuses parallel.ep={group.size()} with {self._num_local_experts} of "
                f"model.num_experts={sizes.num_experts} on a rank ({error}): it takes whole NVLink domains, "
                f"whose ranks hold a multiple of {EXPERT_MULTIPLE} experts together; use a parallel.ep that "
                "fills domains or lies in one, other numbers of experts, or "
                "parallel.dispatcher=hierarchical or alltoall"
            ) from error

    def send(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Sent]:
        """See Carrier; on the current stream, so nothing is left to wait for."""
        x_RD, weights_R, _, counts_e, handle = self._buffer.dispatch_with_permute(
            hidden=self._filled_up(x_TD),
            routing_map=self._by_expert(ids_TK, torch.ones_like(ids_TK, dtype=torch.bool)),
            probs=self._by_expert(ids_TK, weights_TK),
            num_of_experts_per_rank=self._num_local_experts,
        )
        ids_e = torch.arange(self._num_local_experts, device=x_TD.device)
        ids_R = ids_e.repeat_interleave(counts_e.to(x_TD.device), output_size=len(x_RD))
        journey = _Journey(handle, len(x_RD), ids_TK)
        return x_RD, weights_R[:, None], Sent(ids_R[:, None], journey, _nothing)

    def send_again(self, x_TD: Tensor, handle: _Journey) -> Tensor:
        """See Carrier."""
        x_RD: Tensor = self._buffer.dispatch_with_permute(
            hidden=self._filled_up(x_TD), handle=handle.handle, num_permuted_tokens=handle.num_rows
        )[0]
        return x_RD

    def bring_home(
        self, y_RD: Tensor, handle: _Journey, weights_RK: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See Carrier."""
        ids_TK = handle.ids_TK
        weights_R = None if weights_RK is None else weights_RK.flatten()
        y_PD, weights_PE = self._buffer.combine_with_unpermute(
            hidden=y_RD, probs=weights_R, handle=handle.handle
        )
        y_TD = y_PD[: len(ids_TK)]
        if weights_RK is None:
            return y_TD, None
        weights_TK = weights_PE[: len(ids_TK)].gather(1, ids_TK.clamp(min=0))
        return y_TD, weights_TK.masked_fill(ids_TK < 0, 0.0)

    def close(self) -> None:
        """See Carrier; its destructor frees them."""
        del self._buffer

    def _filled_up(self, x_TD: Tensor) -> Tensor:
        missing = self._num_tokens - len(x_TD)
        if missing < 0:
            raise ValueError(f"{len(x_TD)} tokens, but buffers for {self._num_tokens}")
        return torch.cat([x_TD, x_TD.new_zeros(missing, x_TD.shape[1])]) if missing else x_TD

    def _by_expert(self, ids_TK: Tensor, values_TK: Tensor) -> Tensor:
        """The value of each pair in its expert's column, zero elsewhere: [P, E]."""
        column_TK = torch.where(ids_TK >= 0, ids_TK, self._num_experts)  # those of none are cut off
        table_PE = values_TK.new_zeros(self._num_tokens, self._num_experts + 1)
        table_PE[: len(ids_TK)].scatter_(1, column_TK, values_TK)
        return table_PE[:, :-1].contiguous()


def _nothing() -> None:
    pass
