"""Experts split over ranks equal all experts on one rank: outputs and every gradient, shard by shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from gradients import gradients
from poison import poisoned_empty
from tolerances import assert_close

from moe.kernels.topk_route import topk_route
from moe.layer import (
    AllToAllDispatcher,
    Dispatcher,
    GroupedExperts,
    LocalDispatcher,
    MoEConfig,
    MoELayer,
    Routing,
)
from moe.layer.all_to_all import all_to_all_rows

D, F, E, K = 16, 24, 8, 2
CONFIG = MoEConfig(hidden_size=D, num_experts=E, top_k=K, expert_hidden_size=F)
Named = dict[str, torch.Tensor]


def through_experts(
    dispatcher: Dispatcher, experts: GroupedExperts, tokens: Mapping[str, torch.Tensor]
) -> Named:
    """y and all gradients of the tokens of one rank, dispatched by their given ids."""
    x_TD, weights_TK = (tokens[name].clone().requires_grad_() for name in ("x", "weights"))
    counts_E = tokens["ids"].flatten().bincount(minlength=E)
    routing = Routing(tokens["ids"], weights_TK, counts_E)
    dispatched = dispatcher.dispatch(x_TD, routing)
    y_TD = dispatcher.combine(experts(dispatched.x_RD, dispatched), dispatched)
    parameters = dict(experts.named_parameters())
    grads = gradients(y_TD, tokens["cotangent"], x=x_TD, weights=weights_TK, **parameters)
    return {"y": y_TD.detach(), **grads}


def make_experts(dtype: torch.dtype, rank: int = 0, num_ranks: int = 1) -> GroupedExperts:
    """The shard of a rank; shards of one seed are parts of one whole."""
    torch.manual_seed(0)
    whole = GroupedExperts(CONFIG, E, dtype=dtype)
    whole.reset_parameters(std=0.2)
    shard = GroupedExperts(CONFIG, E // num_ranks, dtype=dtype)
    shards = {name: p.chunk(num_ranks)[rank] for name, p in whole.named_parameters()}
    shard.load_state_dict(shards)
    return shard


def dispatch_on_rank(tokens_of_rank: list[Named], dtype: torch.dtype) -> Named:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    dispatcher = AllToAllDispatcher(E, dist.group.WORLD)
    with poisoned_empty():
        return through_experts(dispatcher, make_experts(dtype, rank, num_ranks), tokens_of_rank[rank])


def make_tokens(ids_TK: torch.Tensor, seed: int, dtype: torch.dtype) -> Named:
    generator = torch.Generator().manual_seed(seed)
    x_TD, cotangent_TD = torch.randn(2, len(ids_TK), D, generator=generator).to(dtype)
    weights_TK = torch.rand(ids_TK.shape, generator=generator)
    return {"ids": ids_TK, "x": x_TD, "cotangent": cotangent_TD, "weights": weights_TK}


def some_ids(num_tokens: int, experts: range, seed: int) -> torch.Tensor:
    """Two different experts for each token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, len(experts), generator=generator).argsort(dim=1)[:, :K] + experts.start


def scenario(name: str, num_ranks: int) -> list[torch.Tensor]:
    """The ids of each rank's tokens. Rank 0 holds the first experts."""
    every, first, last = range(E), range(E // num_ranks), range(E - E // num_ranks, E)
    num_tokens, experts = {
        "uneven_counts": ([7, 63, 1, 12], [every] * 4),
        "one_token_each": ([1] * 4, [every] * 4),
        "rank_0_sends_nothing_to_the_last": ([7] * 4, [first, every, every, every]),
        "the_last_receives_nothing": ([7, 5, 6, 3], [first] * 4),
        "all_to_the_last": ([7, 5, 6, 3], [last] * 4),
        "rank_0_has_no_tokens": ([0, 5, 6, 3], [every] * 4),
    }[name]
    return [some_ids(num_tokens[rank], experts[rank], seed=rank) for rank in range(num_ranks)]


SCENARIOS = [
    "uneven_counts",
    "one_token_each",
    "rank_0_sends_nothing_to_the_last",
    "the_last_receives_nothing",
    "all_to_the_last",
    "rank_0_has_no_tokens",
]


@pytest.fixture(scope="module")
def ranks(start_ranks):
    return start_ranks(4)


def check_dispatch(ranks, ids_of_rank: list[torch.Tensor], dtype: torch.dtype) -> None:
    tokens_of_rank = [make_tokens(ids_TK, seed, dtype) for seed, ids_TK in enumerate(ids_of_rank)]
    num_ranks = len(tokens_of_rank)
    results = ranks.run(dispatch_on_rank, tokens_of_rank, dtype, num_ranks=num_ranks)
    # On one rank the tokens of all ranks are one batch.
    batch = {name: torch.cat([tokens[name] for tokens in tokens_of_rank]) for name in tokens_of_rank[0]}
    expected = through_experts(LocalDispatcher(E), make_experts(dtype), batch)
    lengths = [len(ids_TK) for ids_TK in ids_of_rank]
    for name, whole in expected.items():
        is_expert = name.startswith("w_")
        parts = whole.chunk(num_ranks) if is_expert else whole.split(lengths)
        for rank, (result, part) in enumerate(zip(results, parts, strict=True)):
            assert_close(f"{name} of rank {rank}", result[name], part, dtype=dtype)
            if is_expert:  # an expert that nobody chose
                unchosen = batch["ids"].flatten().bincount(minlength=E).chunk(num_ranks)[rank] == 0
                assert not result[name][unchosen].any()


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", SCENARIOS)
def test_all_to_all_equals_one_rank(ranks, name, num_ranks):
    check_dispatch(ranks, scenario(name, num_ranks), torch.float32)


def test_all_to_all_in_bf16_equals_one_rank(ranks):
    check_dispatch(ranks, scenario("uneven_counts", 2), torch.bfloat16)


def make_layer(ep_group: dist.ProcessGroup | None, rank: int = 0, num_ranks: int = 1) -> MoELayer:
    layer = MoELayer(replace(CONFIG, shared_expert_hidden_size=8, renormalize=True), ep_group=ep_group)
    layer.experts = make_experts(torch.float32, rank, num_ranks)
    torch.manual_seed(1)
    layer.router.reset_parameters(std=0.5)
    layer.shared_expert.reset_parameters(std=0.2)
    return layer


def layer_on_rank(x_SBD_of_rank: list[torch.Tensor]) -> Named:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    with poisoned_empty():
        layer = make_layer(dist.group.WORLD, rank, num_ranks)
        return run_layer(layer, x_SBD_of_rank[rank])


def run_layer(layer: MoELayer, x_SBD: torch.Tensor) -> Named:
    x_SBD = x_SBD.clone().requires_grad_()
    output = layer(x_SBD)
    grads = gradients(output.y, torch.cos(x_SBD.detach()), x=x_SBD, **dict(layer.named_parameters()))
    return {"y": output.y.detach(), "counts": output.counts_E, **grads}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_whole_layer_equals_one_rank(ranks, num_ranks):
    generator = torch.Generator().manual_seed(7)
    x_SBD_of_rank = [torch.randn(5, B, D, generator=generator) for B in (1, 3, 2, 1)[:num_ranks]]
    results = ranks.run(layer_on_rank, x_SBD_of_rank, num_ranks=num_ranks)
    alone = [run_layer(make_layer(None), x_SBD) for x_SBD in x_SBD_of_rank]
    for rank, (result, expected) in enumerate(zip(results, alone, strict=True)):
        assert torch.equal(result["counts"], expected["counts"])
        for name in expected.keys() - {"counts", "experts.w_gate_up_eGD", "experts.w_down_eDF"}:
            assert_close(f"{name} of rank {rank}", result[name], expected[name])
        for name in ("experts.w_gate_up_eGD", "experts.w_down_eDF"):  # here the tokens of all ranks meet
            whole = torch.stack([one[name] for one in alone]).sum(dim=0)
            assert_close(f"{name} of rank {rank}", result[name], whole.chunk(num_ranks)[rank])


# A gate that sends all to one expert, ties between all experts, capacities that overflow.
EXTREMES = {
    "one_hot": {"hot": 9.0},
    "ties": {"tied": True},
    "overflow": {"hot": 9.0, "capacity_factor": 0.5},
    "one_fits": {"capacity_factor": 1e-9, "hot": 9.0},
}


def extreme_layer(
    group: dist.ProcessGroup | None,
    rank: int,
    num_ranks: int,
    *,
    hot: float = 0.0,
    tied: bool = False,
    **settings: float,
) -> MoELayer:
    layer = MoELayer(replace(CONFIG, renormalize=True, **settings), ep_group=group)
    layer.experts = make_experts(torch.float32, rank, num_ranks)
    torch.manual_seed(1)
    layer.router.reset_parameters(std=0.0 if tied else 0.5)
    layer.router.bias_E[0] = hot
    return layer


def extreme_on_rank(x_SBD_of_rank: list[torch.Tensor], settings: dict[str, float]) -> tuple[Named, int]:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    layer = extreme_layer(dist.group.WORLD, rank, num_ranks, **settings)
    with poisoned_empty():
        x_SBD = x_SBD_of_rank[rank]
        return run_layer(layer, x_SBD), int(layer(x_SBD).num_dropped)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("settings", EXTREMES.values(), ids=EXTREMES)
def test_extremes_equal_one_rank(ranks, settings, num_ranks):
    generator = torch.Generator().manual_seed(9)
    x_SBD_of_rank = [torch.randn(5, B, D, generator=generator) for B in (1, 3, 2, 1)[:num_ranks]]
    results = ranks.run(extreme_on_rank, x_SBD_of_rank, settings, num_ranks=num_ranks)
    alone = [run_layer(extreme_layer(None, 0, 1, **settings), x_SBD) for x_SBD in x_SBD_of_rank]
    for rank, ((result, dropped), expected) in enumerate(zip(results, alone, strict=True)):
        assert torch.equal(result["counts"], expected["counts"])
        pairs = x_SBD_of_rank[rank][..., 0].numel() * K
        assert dropped + int(result["counts"].sum()) == pairs, "tokens are not conserved"
        assert bool(dropped) == ("capacity_factor" in settings)
        for name in expected.keys() - {"counts", "experts.w_gate_up_eGD", "experts.w_down_eDF"}:
            assert_close(f"{name} of rank {rank}", result[name], expected[name])
        for name in ("experts.w_gate_up_eGD", "experts.w_down_eDF"):
            whole = torch.stack([one[name] for one in alone]).sum(dim=0)
            assert_close(f"{name} of rank {rank}", result[name], whole.chunk(num_ranks)[rank])


def nan_on_rank() -> tuple[torch.Tensor, torch.Tensor]:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    layer = extreme_layer(dist.group.WORLD, rank, num_ranks)
    x_SBD = torch.randn(4, 1, D, generator=torch.Generator().manual_seed(rank))
    if rank == 1:
        x_SBD[2] = float("nan")
    output = layer(x_SBD)
    output.y.nansum().backward()
    return output.y.isfinite().all(dim=-1).flatten(), output.weight_sum


def test_a_nan_stays_with_its_token_and_hangs_nobody(ranks):
    first, second = ranks.run(nan_on_rank, num_ranks=2)
    assert first[0].all() and first[1].isfinite()
    assert second[0].tolist() == [True, True, False, True] and second[1].isnan()


def rows_on_rank() -> tuple[list[int], list[int]]:
    """Rank r sends r + p rows to rank p, each row holding 10 r + p; the gradient is an expanded one."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    send_rows = tuple(rank + peer for peer in range(num_ranks))
    x = torch.tensor([10 * rank + peer for peer in range(num_ranks) for _ in range(send_rows[peer])])
    x = x.float()[:, None].requires_grad_()
    out = all_to_all_rows(x, send_rows, send_rows, dist.group.WORLD)  # what r sends to p, p sends to r
    (out.sum() * (rank + 1)).backward()
    return out.flatten().int().tolist(), x.grad.flatten().int().tolist()


def test_rows_arrive_in_rank_order_and_gradients_go_back(ranks):
    assert ranks.run(rows_on_rank, num_ranks=3) == [
        ([10, 20, 20], [2, 3, 3]),
        ([1, 11, 11, 21, 21, 21], [1, 2, 2, 3, 3, 3]),
        ([2, 2, 12, 12, 12, 22, 22, 22, 22], [1, 1, 2, 2, 2, 3, 3, 3, 3]),
    ]


def refusals_on_rank() -> list[str]:
    group = dist.group.WORLD
    routing = Routing(*topk_route(torch.zeros(3, E), K))
    foreign = LocalDispatcher(E).dispatch(torch.zeros(3, D), routing)
    attempts = [
        lambda: AllToAllDispatcher(7, group),
        lambda: MoELayer(replace(CONFIG, num_experts=7), ep_group=group),
        lambda: AllToAllDispatcher(E, group).combine(torch.zeros(6, D), foreign),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(ValueError) as caught:
            attempt()
        messages.append(str(caught.value))
    return messages


def test_what_does_not_fit_is_refused(ranks):
    for messages in ranks.run(refusals_on_rank, num_ranks=2):
        assert messages == [
            "7 experts cannot be split over 2 expert-parallel ranks",
            "7 experts cannot be split over 2 expert-parallel ranks",
            "these rows were dispatched by another dispatcher: they carry no exchange",
        ]
