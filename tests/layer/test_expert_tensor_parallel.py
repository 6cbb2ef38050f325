"""Experts that ranks split along F equal whole experts on one rank: outputs and every gradient by name.

Ranks are numbered as in Megatron: neighbours split the same experts. With biases, and with every dispatcher.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gradients import gradients
from poison import poisoned_empty
from ranks_pool import RankPool
from tolerances import assert_close

from moe.layer import (
    AllToAllDispatcher,
    Dispatcher,
    ExpertTensorDispatcher,
    GroupedExperts,
    HierarchicalDispatcher,
    LocalDispatcher,
    MoEConfig,
    MoELayer,
    Routing,
    split_by_node,
)

D, F, E, K = 16, 24, 8, 3
CONFIG = MoEConfig(
    hidden_size=D,
    num_experts=E,
    top_k=K,
    expert_hidden_size=F,
    activation="clamped_swiglu",
    expert_bias=True,
)
Named = dict[str, torch.Tensor]
Sizes = tuple[int, int]  # ep, etp


@pytest.fixture(scope="module")
def ranks(start_ranks: Any) -> RankPool:
    pool: RankPool = start_ranks(4)
    return pool


def group_of(ranks: list[int]) -> dist.ProcessGroup:
    made = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


def groups_of(sizes: Sizes) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks with other experts, and those with other parts of the same ones."""
    ep, etp = sizes
    ep_rank, etp_rank = divmod(dist.get_rank(), etp)
    ep_group = group_of([other * etp + etp_rank for other in range(ep)])
    return ep_group, group_of([ep_rank * etp + other for other in range(etp)])


def slice_of(name: str, whole: torch.Tensor, rank: int, sizes: Sizes) -> torch.Tensor:
    """What a rank holds of a tensor of all experts: of gate and up the same rows, of down those columns."""
    ep, etp = sizes
    experts = whole.chunk(ep)[rank // etp]
    dim = {"w_gate_up_eGD": 1, "w_down_eDF": 2, "b_gate_up_eG": 1, "b_down_eD": 1}[name]
    halves = experts.chunk(2, dim=1) if "gate_up" in name else [experts]
    return torch.cat([half.chunk(etp, dim=dim)[rank % etp] for half in halves], dim=1)


def make_experts(dtype: torch.dtype, rank: int = 0, sizes: Sizes = (1, 1)) -> GroupedExperts:
    """The part of a rank; parts of one seed are parts of one whole."""
    whole = GroupedExperts(CONFIG, E, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
    drawn = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    ep, etp = sizes
    part = GroupedExperts(CONFIG, E // ep, slices=etp, slice_here=rank % etp, dtype=dtype)
    part.load_state_dict({name: slice_of(name, tensor, rank, sizes) for name, tensor in drawn.items()})
    return part


def through(dispatcher: Dispatcher, experts: GroupedExperts, tokens: Named) -> Named:
    """y and all gradients of the tokens of one rank, dispatched by their given ids."""
    x_TD, weights_TK = (tokens[name].clone().requires_grad_() for name in ("x", "weights"))
    ids_TK = tokens["ids"]
    counts_E = ids_TK[ids_TK >= 0].bincount(minlength=E)
    dispatched = dispatcher.dispatch(x_TD, Routing(ids_TK, weights_TK, counts_E))
    y_TD = dispatcher.combine(experts(dispatched.x_RD, dispatched), dispatched)
    parameters = dict(experts.named_parameters())
    grads = gradients(y_TD, tokens["cotangent"], x=x_TD, weights=weights_TK, **parameters)
    return {"y": y_TD.detach(), **grads}


def tokens_of(rank: int, scenario: str, dtype: torch.dtype) -> Named:
    """Ranks have 5, 9, 13 and 17 tokens; a fifth of the pairs is dropped."""
    T = 0 if scenario == "idle" and rank == 1 else 5 + 4 * rank
    generator = torch.Generator().manual_seed(rank)
    first = E // 2 if scenario == "empty experts" else 0
    ids_TK = torch.rand(T, E - first, generator=generator).argsort(dim=1)[:, :K] + first
    if scenario == "hot":
        ids_TK[:] = torch.tensor([5, -1, -1])
    dropped_TK = torch.rand(T, K, generator=generator) < 0.2
    x_TD, cotangent_TD = torch.randn(2, T, D, generator=generator).to(dtype)
    weights_TK = torch.rand(T, K, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    ids_TK = ids_TK.masked_fill(dropped_TK, -1)
    return {"ids": ids_TK, "x": x_TD, "weights": weights_TK, "cotangent": cotangent_TD}


def on_rank(sizes: Sizes, inner: str, scenario: str, dtype: torch.dtype) -> tuple[Named, Named]:
    """The same twice."""
    rank = dist.get_rank()
    ep_group, etp_group = groups_of(sizes)
    dispatchers = {
        "local": lambda: LocalDispatcher(E),
        "alltoall": lambda: AllToAllDispatcher(E, ep_group),
        "hierarchical": lambda: HierarchicalDispatcher(E, split_by_node(ep_group, 1)),
    }
    dispatcher = ExpertTensorDispatcher(dispatchers[inner](), etp_group)
    tokens = tokens_of(rank, scenario, dtype)
    with poisoned_empty():
        first, second = (through(dispatcher, make_experts(dtype, rank, sizes), tokens) for _ in range(2))
    return first, second


@pytest.mark.parametrize(
    ("sizes", "inner", "scenario", "dtype"),
    [
        ((1, 2), "local", "uneven", torch.float64),
        ((1, 2), "local", "uneven", torch.float32),
        ((1, 2), "local", "idle", torch.float32),
        ((1, 2), "local", "hot", torch.float32),
        ((1, 4), "local", "uneven", torch.float32),
        ((2, 2), "alltoall", "uneven", torch.float64),
        ((2, 2), "alltoall", "uneven", torch.float32),
        ((2, 2), "alltoall", "uneven", torch.bfloat16),
        ((2, 2), "alltoall", "idle", torch.float32),
        ((2, 2), "alltoall", "hot", torch.float32),
        ((2, 2), "alltoall", "empty experts", torch.float32),
        ((2, 2), "hierarchical", "uneven", torch.float32),
        ((2, 2), "hierarchical", "idle", torch.float32),
    ],
)
def test_split_experts_equal_whole_ones(
    ranks: RankPool, sizes: Sizes, inner: str, scenario: str, dtype: torch.dtype
) -> None:
    num_ranks = sizes[0] * sizes[1]
    results = ranks.run(on_rank, sizes, inner, scenario, dtype, num_ranks=num_ranks)
    tokens = [tokens_of(rank, scenario, dtype) for rank in range(num_ranks)]
    batch = {name: torch.cat([one[name] for one in tokens]) for name in tokens[0]}
    expected = through(LocalDispatcher(E), make_experts(dtype), batch)
    assert expected.keys() == {"y", "x", "weights", *dict(make_experts(dtype).named_parameters())}
    lengths = [len(one["ids"]) for one in tokens]
    for name, whole in expected.items():
        of_tokens = name in ("y", "x", "weights")
        for rank, (first, second) in enumerate(results):
            part = whole.split(lengths)[rank] if of_tokens else slice_of(name, whole, rank, sizes)
            assert_close(f"{name} of rank {rank}", first[name], part, dtype=dtype)
            assert torch.equal(first[name], second[name]), f"{name} of rank {rank} differs in a second run"


SHARED = replace(CONFIG, shared_expert_hidden_size=8, aux_loss="batch", aux_loss_coeff=0.1, z_loss_coeff=0.1)


def run_layer(layer: MoELayer, x_SBD: torch.Tensor) -> Named:
    x_SBD = x_SBD.clone().requires_grad_()
    output = layer(x_SBD)
    parameters = dict(layer.named_parameters())
    grads = gradients(output.y + output.losses.total, torch.cos(x_SBD.detach()), x=x_SBD, **parameters)
    return {"y": output.y.detach(), **grads}


def make_layer(overlap: bool, rank: int = 0, sizes: Sizes = (1, 1), **groups: Any) -> MoELayer:
    layer = MoELayer(SHARED, overlap=overlap, **groups)
    layer.experts.load_state_dict(make_experts(torch.float32, rank, sizes).state_dict())
    torch.manual_seed(1)
    layer.router.reset_parameters(std=0.5)
    layer.shared_expert.reset_parameters(std=0.2)
    return layer


def input_of(rank: int) -> torch.Tensor:
    return torch.randn(5, rank + 1, D, generator=torch.Generator().manual_seed(rank))


def layer_on_rank(sizes: Sizes) -> tuple[Named, Named]:
    """The layer without overlap and with it."""
    rank = dist.get_rank()
    ep_group, etp_group = groups_of(sizes)
    with poisoned_empty():
        return tuple(
            run_layer(
                make_layer(overlap, rank, sizes, ep_group=ep_group, etp_group=etp_group), input_of(rank)
            )
            for overlap in (False, True)
        )


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)])
def test_a_whole_layer_equals_one_rank(ranks: RankPool, sizes: Sizes) -> None:
    num_ranks = sizes[0] * sizes[1]
    results = ranks.run(layer_on_rank, sizes, num_ranks=num_ranks)
    alone = [run_layer(make_layer(False), input_of(rank)) for rank in range(num_ranks)]
    for rank, (without, with_overlap) in enumerate(results):
        for name, own in alone[rank].items():
            prefix, _, leaf = name.rpartition(".")
            expected = own
            if prefix == "experts":  # here the tokens of all ranks meet
                expected = slice_of(leaf, torch.stack([one[name] for one in alone]).sum(dim=0), rank, sizes)
            assert_close(f"{name} of rank {rank}", without[name], expected)
            assert torch.equal(with_overlap[name], without[name]), name


def drawn_on_rank(on_meta: bool) -> Named:
    torch.manual_seed(3)
    ep_group, etp_group = groups_of((2, 2))
    device = "meta" if on_meta else None
    layer = MoELayer(SHARED, ep_group=ep_group, etp_group=etp_group, device=device)
    if on_meta:
        layer.to_empty(device="cpu")
        for tensor in layer.state_dict().values():
            tensor.fill_(torch.nan)
        layer.reset_parameters()
    return layer.state_dict()


def test_ranks_draw_different_parts_and_the_same_router_also_after_meta(ranks: RankPool) -> None:
    drawn = ranks.run(drawn_on_rank, False)
    assert all(one["router.weight_ED"].equal(drawn[0]["router.weight_ED"]) for one in drawn)
    downs = [one["experts.w_down_eDF"] for one in drawn]
    assert [down.shape for down in downs] == [(E // 2, D, F // 2)] * 4
    assert len({float(down.sum()) for down in downs}) == 4
    for rank, after_meta in enumerate(ranks.run(drawn_on_rank, True)):
        for name, tensor in drawn[rank].items():
            assert after_meta[name].equal(tensor), f"{name} of rank {rank}"


def nodes_alone_on_rank() -> None:
    with pytest.raises(ValueError, match="nodes are those of ep_group, which is None"):
        MoELayer(CONFIG, nodes=split_by_node(dist.group.WORLD, 2))


def test_nodes_without_a_group_are_refused(ranks: RankPool) -> None:
    ranks.run(nodes_alone_on_rank)


def refusals_on_rank() -> list[str]:
    world = dist.group.WORLD
    foreign = LocalDispatcher(E).dispatch(
        torch.zeros(1, D), Routing(torch.zeros(1, K).long(), torch.zeros(1, K), torch.zeros(E).long())
    )
    messages = []
    for attempt in (
        lambda: MoELayer(replace(CONFIG, expert_hidden_size=22), etp_group=world),
        lambda: MoELayer(replace(CONFIG, hidden_size=18), etp_group=world),
        lambda: ExpertTensorDispatcher(LocalDispatcher(E), world).combine(torch.zeros(1, D), foreign),
    ):
        with pytest.raises(ValueError) as caught:
            attempt()
        messages.append(str(caught.value))
    return messages


def test_what_does_not_fit_is_refused(ranks: RankPool) -> None:
    for messages in ranks.run(refusals_on_rank):
        assert messages == [
            "experts of expert_hidden_size=22 and hidden_size=16 cannot be split over 4 "
            "expert-tensor-parallel ranks",
            "experts of expert_hidden_size=24 and hidden_size=18 cannot be split over 4 "
            "expert-tensor-parallel ranks",
            "these rows were dispatched by another dispatcher: no group has gathered them",
        ]
