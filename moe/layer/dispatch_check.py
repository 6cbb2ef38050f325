"""Whether a dispatcher moves rows right: two small batches through it and through the plain all-to-all.

A dispatcher that loses, doubles or swaps rows trains all the same, only worse. A batch holds what goes
wrong first: odd numbers of tokens, a rank with few, an expert of half the tokens, one of none, dropped pairs,
a token that goes nowhere. Its numbers are small integers and halves, whose sums are exact in bf16 in any
order, so that nothing but equality will do. Both batches are on their way at once, as those of layers and of
micro-batches are, and send as many rows to each rank: one that takes the other's way makes no noise.

Shapes: T tokens of this rank, K top-k, E experts, D model, N pairs with an expert of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe.errors import InputError, MoeError
from moe.layer.dispatch import AllToAllDispatcher, Dispatcher
from moe.layer.dispatch_fused import ExchangeSizes
from moe.layer.types import Dispatched, Routing

MOST_TOKENS, FEW_TOKENS = 257, 3
# Sums of K products of at most 2 * 2 * 1 in halves need 8 K steps; bf16 counts to 256.
MOST_TOP_K = 32
DROPPED = 0.1


class WrongDispatchError(MoeError):
    """Rows came home wrong; raised on every rank of the group."""

    on_all_ranks = True


@dataclass(frozen=True)
class _Batch:
    """One rank's."""

    x_TD: Tensor
    weights_TK: Tensor
    cotangent_TD: Tensor
    routing_ids_TK: Tensor
    scale_ED: Tensor  # expert e's output is its row times scale_ED[e]; the same on every rank


def check_dispatcher(
    dispatcher: Dispatcher,
    group: dist.ProcessGroup,
    sizes: ExchangeSizes,
    *,
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> None:
    """Send two batches through it, and their gradients home; collective over the group.

    Args:
        dispatcher: any whose experts lie on the ranks of the group in order.
        group: expert-parallel ranks.
        sizes: of the exchange; at most `tokens_per_rank` tokens leave each rank.
        name: of the dispatcher, with its library's version, for the message.
        dtype: of the rows.
        device: of the rows.

    Raises:
        InputError: top_k is too large for exact sums.
        WrongDispatchError: the output, or a gradient, is not that of the plain all-to-all on some rank.
    """
    if sizes.top_k > MOST_TOP_K:
        raise InputError(
            f"{name} is checked with sums that are exact for at most {MOST_TOP_K} experts a token, and "
            f"top_k={sizes.top_k}; use parallel.dispatcher=hierarchical or alltoall"
        )
    batch = _batch(group.rank(), sizes, dtype, device)
    batches = (batch, _turned(batch))
    first = group.rank() * (sizes.num_experts // group.size())
    expected = _through(AllToAllDispatcher(sizes.num_experts, group), batches, first)
    found = _through(dispatcher, batches, first)
    mine = {
        what: max(_difference(one[what], other[what]) for one, other in zip(found, expected, strict=True))
        for what in expected[0]
    }
    everyone: list[tuple[int, dict[str, float]]] = [(0, {})] * group.size()
    dist.all_gather_object(everyone, (dist.get_rank(), mine), group=group)
    wrong = [(far, what, rank) for rank, all_of in everyone for what, far in all_of.items() if far > 0]
    if not wrong:
        return
    far, what, rank = max(wrong)
    names = ", ".join(sorted({name for _, name, _ in wrong}))
    raise WrongDispatchError(
        f"{name} does not move rows as a plain all-to-all does, so it would train wrongly without a word. "
        f"On {len({rank for *_, rank in wrong})} of {group.size()} ranks of an expert group these differ: "
        f"{names}; most of all {what} on rank {rank}, by {far:g}. Use parallel.dispatcher=hierarchical or "
        "alltoall, or another version of the library"
    )


def _batch(rank: int, sizes: ExchangeSizes, dtype: torch.dtype, device: torch.device | str) -> _Batch:
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
    T = min(FEW_TOKENS if rank == 1 else MOST_TOKENS + 2 * (rank % 8), sizes.tokens_per_rank)
    D, E, K = sizes.hidden_size, sizes.num_experts, sizes.top_k
    halves_TK = torch.randint(1, 3, (T, K), generator=own) / 2
    return _Batch(
        x_TD=_small_integers(T, D, own).to(device, dtype),
        weights_TK=halves_TK.to(device),
        cotangent_TD=_small_integers(T, D, own).sign().to(device, dtype),
        routing_ids_TK=_ids(T, E, K, own).to(device),
        scale_ED=_small_integers(E, D, shared).to(device, dtype),
    )


def _turned(batch: _Batch) -> _Batch:
    """The last token first, and its other numbers negative: as many rows go the same ways."""
    return _Batch(
        x_TD=-batch.x_TD.flip(0),
        weights_TK=batch.weights_TK.flip(0),
        cotangent_TD=-batch.cotangent_TD.flip(0),
        routing_ids_TK=batch.routing_ids_TK.flip(0),
        scale_ED=batch.scale_ED,
    )


def _small_integers(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """-2, -1, 1 or 2: no zero, which could be anything that was lost."""
    return torch.tensor([-2.0, -1.0, 1.0, 2.0])[torch.randint(0, 4, (rows, columns), generator=generator)]


def _ids(T: int, E: int, K: int, generator: torch.Generator) -> Tensor:
    scores_TE = torch.rand(T, E, generator=generator)
    scores_TE[:, -1] = -1.0  # chosen by nobody, unless all are
    scores_TE[::2, 0] = 2.0
    ids_TK = scores_TE.topk(K, dim=1).indices
    ids_TK.masked_fill_(torch.rand(T, K, generator=generator) < DROPPED, -1)
    ids_TK[1:2] = -1
    return ids_TK


def _through(dispatcher: Dispatcher, batches: Sequence[_Batch], first_expert: int) -> list[dict[str, Tensor]]:
    """The output and all gradients of each, by name: all leave, all come home, the last goes back first."""
    leaves = [
        (batch.x_TD.clone().requires_grad_(), batch.weights_TK.clone().requires_grad_()) for batch in batches
    ]
    arrived = []
    for batch, (x_TD, weights_TK) in zip(batches, leaves, strict=True):
        ids_TK = batch.routing_ids_TK
        counts_E = ids_TK[ids_TK >= 0].bincount(minlength=len(batch.scale_ED))
        arrived.append(dispatcher.dispatch(x_TD, Routing(ids_TK, weights_TK, counts_E)))
    outputs = [
        dispatcher.combine(_scaled(dispatched, batch.scale_ED[first_expert:]), dispatched)
        for batch, dispatched in zip(batches, arrived, strict=True)
    ]
    for batch, y_TD in reversed(list(zip(batches, outputs, strict=True))):
        y_TD.backward(batch.cotangent_TD)
    results = []
    for y_TD, (x_TD, weights_TK) in zip(outputs, leaves, strict=True):
        assert x_TD.grad is not None and weights_TK.grad is not None
        results.append(
            {
                "the output": y_TD.detach(),
                "the gradient of x": x_TD.grad,
                "the gradient of weights": weights_TK.grad,
            }
        )
    return results


def _scaled(dispatched: Dispatched, scale_ED: Tensor) -> Tensor:
    """The simplest experts that tell tokens, experts and weights apart: y of each row that arrived."""
    order_N, _, ends_e = dispatched.index
    order_N = order_N[: int(ends_e[-1])]  # sentinels come last
    place_N = torch.arange(len(order_N), dtype=ends_e.dtype, device=ends_e.device)
    expert_N = torch.searchsorted(ends_e, place_N, right=True)
    row_N = order_N // dispatched.weights_RK.shape[1]
    weight_N1 = dispatched.weights_RK.flatten()[order_N][:, None]
    y_ND = dispatched.x_RD[row_N].float() * scale_ED[expert_N].float() * weight_N1
    y_RD = torch.zeros(dispatched.x_RD.shape, dtype=y_ND.dtype, device=y_ND.device)
    return y_RD.index_add(0, row_N, y_ND).to(dispatched.x_RD.dtype)


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest; infinite for another shape and for NaN."""
    if found.shape != expected.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    return float((found.double() - expected.double()).abs().nan_to_num(nan=float("inf")).max())
