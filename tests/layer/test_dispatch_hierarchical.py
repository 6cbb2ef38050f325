"""Two hops equal one all-to-all, and overlap changes no bit: 4 ranks as 2 nodes of 2."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gradients import gradients
from poison import poisoned_empty
from ranks_pool import RankPool
from sent_bytes import SentBytes
from tolerances import assert_close
from torch.multiprocessing.reductions import StorageWeakRef

from moe.layer import (
    AllToAllDispatcher,
    Dispatcher,
    GroupedExperts,
    HierarchicalDispatcher,
    MoEConfig,
    MoELayer,
    Routing,
    split_by_node,
)
from moe.layer.all_to_all import all_to_all_rows

D, F, E, K = 16, 24, 8, 3
CONFIG = MoEConfig(
    hidden_size=D, num_experts=E, top_k=K, expert_hidden_size=F, shared_expert_hidden_size=8, aux_loss="batch"
)
Named = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def ranks(start_ranks: Any) -> RankPool:
    pool: RankPool = start_ranks(4)
    return pool


def tokens_of(rank: int, scenario: str, dtype: torch.dtype) -> Named:
    """Some pairs are dropped; a rank of `idle` has no tokens; `one_node` chooses experts of the last only."""
    T = 0 if scenario == "idle" and rank == 1 else 5 + 4 * rank
    generator = torch.Generator().manual_seed(rank)
    first = E // 2 if scenario == "one_node" else 0
    ids_TK = torch.rand(T, E - first, generator=generator).argsort(dim=1)[:, :K] + first
    dropped_TK = torch.rand(T, K, generator=generator) < 0.2
    x_TD, cotangent_TD = torch.randn(2, T, D, generator=generator).to(dtype)
    weights_TK = torch.rand(T, K, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    return {"ids": ids_TK.masked_fill(dropped_TK, -1), "x": x_TD, "w": weights_TK, "cotangent": cotangent_TD}


def through(dispatcher: Dispatcher, tokens: Named, dtype: torch.dtype) -> Named:
    torch.manual_seed(7 + dist.get_rank())
    experts = GroupedExperts(CONFIG, E // dist.get_world_size(), dtype=dtype)
    experts.reset_parameters(std=0.2)
    x_TD, weights_TK = (tokens[name].clone().requires_grad_() for name in ("x", "w"))
    ids_TK = tokens["ids"]
    counts_E = ids_TK[ids_TK >= 0].bincount(minlength=E)
    dispatched = dispatcher.dispatch(x_TD, Routing(ids_TK, weights_TK, counts_E))
    y_TD = dispatcher.combine(experts(dispatched.x_RD, dispatched), dispatched)
    named = dict(experts.named_parameters())
    return {"y": y_TD.detach(), **gradients(y_TD, tokens["cotangent"], x=x_TD, weights=weights_TK, **named)}


def both_on_rank(scenario: str, dtype: torch.dtype) -> tuple[Named, Named, Named]:
    """What one hop gives, two hops, and two hops once more."""
    tokens = tokens_of(dist.get_rank(), scenario, dtype)
    one = AllToAllDispatcher(E, dist.group.WORLD)
    two = HierarchicalDispatcher(E, split_by_node(dist.group.WORLD, 2))
    with poisoned_empty():
        plain, first, second = (through(dispatcher, tokens, dtype) for dispatcher in (one, two, two))
    return plain, first, second


@pytest.mark.parametrize(
    ("scenario", "dtype"),
    [
        ("uneven", torch.float64),
        ("uneven", torch.float32),
        ("uneven", torch.bfloat16),
        ("idle", torch.float32),
        ("one_node", torch.float32),
    ],
)
def test_two_hops_equal_one(ranks: RankPool, scenario: str, dtype: torch.dtype) -> None:
    for rank, (plain, first, second) in enumerate(ranks.run(both_on_rank, scenario, dtype)):
        assert plain.keys() == first.keys() == {"y", "x", "weights", "w_gate_up_eGD", "w_down_eDF"}
        for name, expected in plain.items():
            assert_close(f"{name} of rank {rank}", first[name], expected, dtype=dtype)
            assert torch.equal(first[name], second[name]), f"{name} of rank {rank} differs in a second run"


def crossing_on_rank() -> tuple[int, int, float]:
    """(rows that leave for the other node, (token, other node) pairs, bytes sent to it)."""
    rank = dist.get_rank()
    tokens = tokens_of(rank, "uneven", torch.float32)
    groups = split_by_node(dist.group.WORLD, 2)
    ids_TK = tokens["ids"]
    routing = Routing(ids_TK, tokens["w"], ids_TK[ids_TK >= 0].bincount(minlength=E))
    dispatcher = HierarchicalDispatcher(E, groups)
    with SentBytes() as sent:
        arrive = dispatcher.start(tokens["x"], routing)
    dispatched = arrive()
    other = 1 - rank // 2
    pairs = ((ids_TK >= 0) & (ids_TK // (E // 2) == other)).any(dim=1).sum()
    return dispatched.exchange.across.send_rows[other], int(pairs), sum(sent.by_cause.values())


def test_a_token_crosses_once_for_each_node(ranks: RankPool) -> None:
    row_bytes = 4 * D + (8 + 4) * K  # the row, its ids and weights
    for sent_rows, pairs, sent in ranks.run(crossing_on_rank):
        assert sent_rows == pairs
        assert sent == pairs * row_bytes + 8  # and one count


def layer_on_rank(two_hops: bool) -> tuple[Named, Named]:
    """The layer without overlap and with it."""
    results = []
    nodes = split_by_node(dist.group.WORLD, 2) if two_hops else None
    for overlap in (False, True):
        torch.manual_seed(3)
        layer = MoELayer(CONFIG, ep_group=dist.group.WORLD, nodes=nodes, overlap=overlap)
        x_SBD = torch.randn(6, 2, D, generator=torch.Generator().manual_seed(dist.get_rank()))
        x_SBD.requires_grad_()
        with poisoned_empty():
            output = layer(x_SBD)
            parameters = dict(layer.named_parameters())
            total = output.y + output.losses.total
            grads = gradients(total, torch.cos(x_SBD.detach()), x=x_SBD, **parameters)
        results.append({"y": output.y.detach(), **grads})
    return results[0], results[1]


@pytest.mark.parametrize("two_hops", [False, True])
def test_overlap_changes_no_bit(ranks: RankPool, two_hops: bool) -> None:
    for without, with_overlap in ranks.run(layer_on_rank, two_hops):
        assert "shared_expert.w_down_DF" in without
        for name, expected in without.items():
            assert torch.equal(with_overlap[name], expected), name


def order_on_rank() -> list[str]:
    """Collectives and the shared expert in the order in which they begin and end, forward and backward."""
    seen: list[str] = []
    layer = MoELayer(CONFIG, ep_group=dist.group.WORLD, overlap=True)
    start = dist.all_to_all_single
    layer.shared_expert.register_forward_hook(lambda *_: seen.append("shared"))
    layer.shared_expert.w_down_DF.register_hook(lambda _: seen.append("shared"))

    class Watched:
        def __init__(self, work: dist.Work) -> None:
            self.work = work

        def wait(self) -> None:
            seen.append("wait")
            self.work.wait()

    def watched(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        work = start(*args, async_op=async_op, **kwargs)
        if async_op:
            seen.append("leave")
        return Watched(work) if async_op else work

    dist.all_to_all_single = watched
    try:
        x_SBD = torch.randn(6, 2, D, requires_grad=True)
        layer(x_SBD).y.sum().backward()
    finally:
        dist.all_to_all_single = start
    return seen


def test_shared_expert_runs_between_departure_and_arrival(ranks: RankPool) -> None:
    (seen, *_) = ranks.run(order_on_rank)
    forward = ["leave", "leave", "shared", "wait", "wait", "leave", "wait"]
    backward = ["leave", "wait", "leave", "leave", "shared", "wait", "wait"]
    assert seen == forward + backward


def rows_alive_on_rank() -> tuple[bool, bool]:
    """Whether the memory of what arrived is free when the graph is gone: after a backward, without one."""
    gc.disable()
    try:
        dead = []
        for backward in (True, False):
            x = torch.randn(4, D, requires_grad=True)
            out = all_to_all_rows(x, (1, 1, 1, 1), (1, 1, 1, 1), dist.group.WORLD)
            memory = StorageWeakRef(out.untyped_storage())
            if backward:
                out.sum().backward()
            del out
            # gloo's own thread lets go of its work a moment after whoever waited for it.
            for _ in range(500):
                if memory.expired():
                    break
                time.sleep(0.01)
            dead.append(memory.expired())
        return dead[0], dead[1]
    finally:
        gc.enable()


def test_nothing_stays_in_memory(ranks: RankPool) -> None:
    assert ranks.run(rows_alive_on_rank) == [(True, True)] * 4


def refusals_on_rank() -> list[str]:
    group = dist.group.WORLD
    groups = split_by_node(group, 2)
    plain = AllToAllDispatcher(E, group)
    tokens = tokens_of(dist.get_rank(), "uneven", torch.float32)
    routing = Routing(tokens["ids"], tokens["w"], tokens["ids"].flatten().clamp(0).bincount(minlength=E))
    foreign = plain.dispatch(tokens["x"], Routing(tokens["ids"].clamp(0), tokens["w"], routing.counts_E))
    messages = []
    for attempt in (
        lambda: split_by_node(group, 3),
        lambda: split_by_node(group, 4),
        lambda: HierarchicalDispatcher(6, groups),
        lambda: HierarchicalDispatcher(E, groups).combine(tokens["x"], foreign),
    ):
        with pytest.raises(ValueError) as caught:
            attempt()
        messages.append(str(caught.value))
    return messages


def test_what_does_not_fit_is_refused(ranks: RankPool) -> None:
    for messages in ranks.run(refusals_on_rank):
        assert [text.partition(";")[0] for text in messages] == [
            "4 expert-parallel ranks are not two or more nodes of 3",
            "4 expert-parallel ranks are not two or more nodes of 4",
            "6 experts cannot be split over 2 nodes of 2 ranks",
            "these rows were dispatched by another dispatcher: they carry no two hops",
        ]
