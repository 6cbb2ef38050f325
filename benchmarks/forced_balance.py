"""Every expert the same load: an upper bound that published tables use and no trained router reaches.

A switch of benchmarks only. The router runs as it is, its weights and gradients included, and only the ids
that it chose are replaced: the pairs of a rank's tokens take the experts in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from moe.layer.router import Router
from moe.layer.types import Routing


@contextmanager
def forced_balance() -> Iterator[None]:
    """Routers made or called inside give their tokens to the experts in turn."""
    natural = Router.forward

    def balanced(self: Router, x_TD: Tensor, *, num_sequences: int = 0) -> Routing:
        return in_turn(natural(self, x_TD, num_sequences=num_sequences), self.config.num_experts)

    with patch.object(Router, "forward", balanced):
        yield


def in_turn(routing: Routing, num_experts: int) -> Routing:
    """The same weights for other experts: pair n of T x K meets expert n modulo E.

    A token's K experts differ, as K is at most E. The sums behind the router losses stay the router's own.
    """
    ids_TK = routing.ids_TK
    pairs_N = torch.arange(ids_TK.numel(), dtype=ids_TK.dtype, device=ids_TK.device)
    turns_N = pairs_N % num_experts
    counts_E = torch.bincount(turns_N, minlength=num_experts).to(routing.counts_E.dtype)
    return replace(routing, ids_TK=turns_N.view_as(ids_TK), counts_E=counts_E)
