"""What flows between the four stages of the layer: route -> dispatch -> compute -> combine.

Shapes: T tokens on this rank, K top-k, E experts, N = T*K routed pairs, R rows received by this rank's
experts, e experts held by this rank, D model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The router's decision for the tokens of this rank."""

    ids_TK: Tensor  # int64, best first
    weights_TK: Tensor  # fp32, gradients flow through it
    counts_E: Tensor  # int64, how many tokens of this rank chose each expert
    logits_TE: Tensor  # fp32, for the losses


@dataclass(frozen=True)
class Dispatched:
    """Rows for this rank's experts, sorted by expert, and what combine needs to send results home."""

    x_RD: Tensor
    ends_e: Tensor  # int32, expert i owns rows ends[i-1] to ends[i]
    order_N: Tensor  # int64, pairs of this rank in expert order
    inverse_N: Tensor
    exchange: Exchange | None  # None when all experts are here


@dataclass(frozen=True)
class Exchange:
    """How rows travelled between the ranks of the expert group. All sizes are host integers."""

    send_rows: tuple[int, ...]  # to each rank
    recv_rows: tuple[int, ...]  # from each rank
    order_R: Tensor  # received rows in expert order
    inverse_R: Tensor


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
    counts_E: Tensor
