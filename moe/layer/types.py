"""What flows between the four stages of the layer: route -> dispatch -> compute -> combine.

Shapes: T tokens on this rank, K top-k, E experts, N = T*K routed pairs, R rows received by this rank's
experts, e experts held by this rank, D model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe.kernels.topk_route import RouteSums


@dataclass(frozen=True)
class Routing:
    """The router's decision for the tokens of this rank."""

    ids_TK: Tensor  # int64, best first; -1 for a pair that was dropped
    weights_TK: Tensor  # fp32, gradients flow through it
    counts_E: Tensor  # int64, how many tokens of this rank go to each expert
    sums: RouteSums | None = None  # over each sequence, before any drop, for the losses

    @property
    def num_dropped(self) -> Tensor:
        """Pairs that were dropped, int64 on the device."""
        return self.ids_TK.numel() - self.counts_E.sum()


@dataclass(frozen=True)
class Dispatched:
    """Rows for this rank's experts as they arrived, and what combine needs to send results home.

    Where no row travels they are the tokens themselves, R = T with K pairs each; rows that travelled once for
    each pair have one pair each; rows that travelled once for each rank have K, those of other ranks without
    an expert here.
    """

    x_RD: Tensor
    weights_RK: Tensor  # fp32, the combine weights travel with the rows
    index: tuple[Tensor, Tensor, Tensor]  # the R*K pairs by expert of this rank, from permute_index
    exchange: Exchange | TwoHops | Carried | Gathered | None  # None when all experts are here


@dataclass(frozen=True)
class Exchange:
    """How rows travelled between the ranks of the expert group. All sizes are host integers."""

    send_rows: tuple[int, ...]  # to each rank
    recv_rows: tuple[int, ...]  # from each rank
    order_N: Tensor  # int64, this rank's own pairs in the order in which they left
    inverse_N: Tensor
    top_k: int


@dataclass(frozen=True)
class Hop:
    """How rows travelled between the ranks of one group. A rows left, one for each (token, rank)."""

    send_rows: tuple[int, ...]  # to each rank
    recv_rows: tuple[int, ...]  # from each rank
    token_A: Tensor  # int64, of each row that left
    rows_TM: Tensor  # int64, the rows of each token, padded with A


@dataclass(frozen=True)
class TwoHops:
    """How rows travelled over nodes."""

    across: Hop
    inside: Hop


@dataclass(frozen=True)
class Carried:
    """How rows travelled that a library moved: it alone can read its handle."""

    handle: object


@dataclass(frozen=True)
class Gathered:
    """Rows of all ranks that split the same experts, in rank order."""

    own: Dispatched  # those of this rank
    rows: tuple[int, ...]  # of each rank


@dataclass(frozen=True)
class Losses:
    """Router losses of one forward, times their coefficients; this rank's share."""

    balance: Tensor
    z: Tensor

    @property
    def total(self) -> Tensor:
        """What is added to the language-model loss."""
        return self.balance + self.z


@dataclass(frozen=True)
class MoEOutput:
    """Result of the layer's forward."""

    y: Tensor  # the shape of the input
    losses: Losses
    counts_E: Tensor  # tokens of this rank that went to each expert
    num_dropped: Tensor  # pairs of this rank that went to none
    weight_sum: Tensor  # of all combine weights of this rank: NaN if a logit of a token was
