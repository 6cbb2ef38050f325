"""The sum over each token's experts on the CPU: the same rows have a sum of the same bits in every run.

Shapes: T tokens, K top-k, N = T*K routed pairs, D model, R rows of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.expert_mlp.threads import largest_first, share_experts, share_rows
from moe.kernels.grouped_gemm.torch_backend import rows_of_experts

Index = tuple[Tensor, Tensor, Tensor]
Work = Callable[[int, slice, Tensor | None], Tensor]
# Additions take turns, and are up to a tenth of the forward pass of narrow experts.
MOST_THREADS = 8


def sum_of_experts(work: Work, like_TD: Tensor, weights_TK: Tensor, index: Index) -> Tensor:
    """Sum [T, D] of each token's rows, in the dtype of weights inside; rows of no expert count as zeros.

    Args:
        work: computes an expert's rows [R, D] from its number and where they are, into its third argument
            if there is one.
        like_TD: has the shape and the dtype of the result and of what work returns.
        weights_TK: as wide as like_TD, or wider.
        index: of `permute_index`.
    """
    # Narrow rows would each be widened first: half as many bytes and one sum at the end are faster.
    if like_TD.dtype == weights_TK.dtype and torch.get_num_threads() <= MOST_THREADS:
        return _as_they_come(work, like_TD, weights_TK, index)
    return _at_the_end(work, like_TD, weights_TK, index)


def _as_they_come(work: Work, like_TD: Tensor, weights_TK: Tensor, index: Index) -> Tensor:
    """Add rows while they are in the cache: first touches of memory for [N, D] took 5 % of a layer."""
    sums_TD, tokens_N = torch.empty_like(like_TD), index[0] // weights_TK.shape[1]
    experts = largest_first(rows_of_experts(index[2]))
    adder = _InOrder(sums_TD, [expert for expert, _ in experts])

    def zero(tokens: slice) -> None:
        sums_TD[tokens] = 0

    def add(expert: int, rows: slice) -> None:
        adder.add(expert, tokens_N[rows], work(expert, rows, None))

    share_rows(zero, len(sums_TD))
    share_experts(add, experts)
    return sums_TD


@dataclass
class _InOrder:
    """Adds rows in the order of experts; what comes early is kept, so that no thread waits for an expert."""

    sums_TD: Tensor
    order: list[int]
    added: int = 0
    early: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def add(self, expert: int, tokens_R: Tensor, rows_RD: Tensor) -> None:
        with self.lock:
            self.early[expert] = tokens_R, rows_RD
            while self.added < len(self.order) and self.order[self.added] in self.early:
                self.sums_TD.index_add_(0, *self.early.pop(self.order[self.added]))
                self.added += 1


def _at_the_end(work: Work, like_TD: Tensor, weights_TK: Tensor, index: Index) -> Tensor:
    _, inverse_N, ends_e = index
    sums_TD, y_ND = torch.empty_like(like_TD), like_TD.new_empty(weights_TK.numel(), like_TD.shape[1])

    def keep(expert: int, rows: slice) -> None:
        work(expert, rows, y_ND[rows])

    share_experts(keep, rows_of_experts(ends_e))
    y_ND[int(ends_e[-1]) :] = 0
    inverse_TK = inverse_N.view(weights_TK.shape)

    def add_up(tokens: slice) -> None:  # in fp32 inside
        sums_TD[tokens] = F.embedding_bag(inverse_TK[tokens], y_ND, mode="sum")

    share_rows(add_up, len(sums_TD))
    return sums_TD
