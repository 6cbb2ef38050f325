"""DeepEP and HybridEP as dispatchers, on a double of their package: what they were written for, not proof."""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from fake_deep_ep import APIS, FAULTS, double
from gradients import gradients
from poison import poisoned_empty
from ranks_pool import RankPool
from tolerances import assert_close
from torch.multiprocessing.reductions import StorageWeakRef

from moe.errors import InputError
from moe.layer import (
    AllToAllDispatcher,
    Dispatcher,
    GroupedExperts,
    HierarchicalDispatcher,
    LocalDispatcher,
    MoEConfig,
    Routing,
    split_by_node,
)
from moe.layer.dispatch_check import WrongDispatchError, check_dispatcher
from moe.layer.dispatch_fused import ExchangeSizes, FusedDispatcher
from moe.layer.fused_library import build_carrier, import_library, require_api, require_gpu

D, F, E, K = 256, 24, 8, 3
CONFIG = MoEConfig(hidden_size=D, num_experts=E, top_k=K, expert_hidden_size=F)
SIZES = ExchangeSizes(hidden_size=D, num_experts=E, top_k=K, tokens_per_rank=70)
SCENARIOS = ("uneven", "idle", "hot", "empty", "one rank")
NAMES = {"Buffer": "deepep", "ElasticBuffer": "deepep", "HybridEPBuffer": "hybridep"}
Named = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def ranks(start_ranks: Any) -> RankPool:
    pool: RankPool = start_ranks(4)
    return pool


def fused(library: ModuleType, sizes: ExchangeSizes = SIZES) -> FusedDispatcher:
    """A dispatcher on the library over all ranks."""
    group = dist.group.WORLD
    (api,) = (api for api in APIS if hasattr(library, api))
    require_api(NAMES[api], library)
    carrier = build_carrier(NAMES[api], library, group, sizes)
    return FusedDispatcher(carrier, sizes.num_experts // group.size())


# ---- the same rows as by all-to-all, and as on one rank ---------------------------------------------------


def tokens_of(rank: int, scenario: str) -> Named:
    """Some pairs are dropped, and a token of each rank goes nowhere."""
    T = 0 if scenario == "idle" and rank == 1 else 61 + 2 * rank
    generator = torch.Generator().manual_seed(rank)
    scores_TE = torch.rand(T, E, generator=generator)
    if scenario == "hot":
        scores_TE[:, 2] = 2.0
    if scenario == "empty":
        scores_TE[:, 5] = -1.0
    if scenario == "one rank":  # all K of a token lie on the last rank, or on the last two
        scores_TE[:, : E - K] = -1.0
    ids_TK = scores_TE.topk(K, dim=1).indices
    ids_TK.masked_fill_(torch.rand(T, K, generator=generator) < 0.2, -1)
    ids_TK[3:4] = -1
    x_TD, cotangent_TD = torch.randn(2, T, D, generator=generator).bfloat16()
    weights_TK = torch.rand(T, K, generator=generator)
    return {"ids": ids_TK, "x": x_TD, "weights": weights_TK, "cotangent": cotangent_TD}


def all_experts() -> Named:
    torch.manual_seed(7)
    experts = GroupedExperts(CONFIG, E, dtype=torch.bfloat16)
    experts.reset_parameters(std=0.2)
    return {name: weight.detach() for name, weight in experts.named_parameters()}


def through(dispatcher: Dispatcher, tokens: Named, weights: Named) -> Named:
    experts = GroupedExperts(CONFIG, len(weights["w_down_eDF"]), dtype=torch.bfloat16)
    experts.load_state_dict(weights)
    x_TD, weights_TK = (tokens[name].clone().requires_grad_() for name in ("x", "weights"))
    ids_TK = tokens["ids"]
    counts_E = ids_TK[ids_TK >= 0].bincount(minlength=E)
    dispatched = dispatcher.dispatch(x_TD, Routing(ids_TK, weights_TK, counts_E))
    y_TD = dispatcher.combine(experts(dispatched.x_RD, dispatched), dispatched)
    named = dict(experts.named_parameters())
    return {"y": y_TD.detach(), **gradients(y_TD, tokens["cotangent"], x=x_TD, weights=weights_TK, **named)}


def three_on_rank(api: str) -> dict[str, tuple[Named, Named, Named, Named]]:
    """By scenario what one rank gives, an all-to-all, the library, and the library once more."""
    rank, each = dist.get_rank(), E // dist.get_world_size()
    whole = all_experts()
    own = {name: weight[rank * each : (rank + 1) * each] for name, weight in whole.items()}
    plain, library = AllToAllDispatcher(E, dist.group.WORLD), fused(double(api))
    results = {}
    for scenario in SCENARIOS:
        tokens = tokens_of(rank, scenario)
        # ElasticBuffer refuses to run where torch fills new memory.
        with nullcontext() if api == "ElasticBuffer" else poisoned_empty():
            alone = through(LocalDispatcher(E), tokens, whole)
            others = [through(d, tokens, own) for d in (plain, library, library)]
        for name in whole:
            dist.all_reduce(alone[name])
            alone[name] = alone[name][rank * each : (rank + 1) * each]
        results[scenario] = (alone, *others)
    return results


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("api", APIS)
def test_output_and_gradients_are_those_of_all_to_all_and_of_one_rank(
    ranks: RankPool, api: str, num_ranks: int
) -> None:
    for rank, by_scenario in enumerate(ranks.run(three_on_rank, api, num_ranks=num_ranks)):
        for scenario, (alone, plain, first, second) in by_scenario.items():
            assert alone.keys() == first.keys() == {"y", "x", "weights", "w_gate_up_eGD", "w_down_eDF"}
            for name, found in first.items():
                where = f"{name} of rank {rank}, {scenario}"
                assert_close(f"{where}, all-to-all", found, plain[name], dtype=torch.bfloat16)
                assert_close(f"{where}, one rank", found, alone[name], dtype=torch.bfloat16)
                assert torch.equal(found, second[name]), f"{where} differs in a second run"


# ---- the check of the start -------------------------------------------------------------------------------


def checks_on_rank(api: str, sizes: ExchangeSizes, faults: tuple[str, ...]) -> list[str]:
    """What the check says of each fault; empty where it passes."""
    said = []
    for fault in faults:
        dispatcher = fused(double(api, fault), sizes)
        try:
            check_dispatcher(dispatcher, dist.group.WORLD, sizes, name=dispatcher.carrier.name)
            said.append("")
        except WrongDispatchError as error:
            said.append(str(error))
    return said


WHATS = ("the output", "the gradient of x", "the gradient of weights")
# What each fault spoils, and nothing else.
SPOILT = {
    "weights are not returned": {"the gradient of weights"},
    "experts are off by one rank": {"the output", "the gradient of x", "the gradient of weights"},
    "combine adds twice": {"the output", "the gradient of x"},
    "gradients are zero": {"the gradient of x", "the gradient of weights"},
    "gradients are of other tokens": {"the gradient of x", "the gradient of weights"},
    "weights arrive in another order": {"the output", "the gradient of x"},
    "the last row is lost": {"the output", "the gradient of weights"},
    "tokens of nowhere are garbage": {"the output", "the gradient of x"},
    "the handle is that of the newest dispatch": {
        "the output",
        "the gradient of x",
        "the gradient of weights",
    },
}


@pytest.mark.parametrize("api", APIS)
def test_the_check_passes_what_is_right_and_names_what_is_wrong(ranks: RankPool, api: str) -> None:
    results = ranks.run(checks_on_rank, api, SIZES, ("", *FAULTS))
    right, *wrong = results[0]
    assert right == ""
    assert all(others == results[0] for others in results), "every rank raises the same"
    for fault, text in zip(FAULTS, wrong, strict=True):
        assert NAMES[api] in text and "deep_ep" in text and "on rank" in text, fault
        assert {what for what in WHATS if what in text} == SPOILT[fault], f"{fault}: {text}"


@pytest.mark.parametrize(
    "sizes",
    [
        ExchangeSizes(hidden_size=512, num_experts=64, top_k=32, tokens_per_rank=300),
        ExchangeSizes(hidden_size=256, num_experts=4, top_k=4, tokens_per_rank=5),
        ExchangeSizes(hidden_size=256, num_experts=4, top_k=1, tokens_per_rank=1),
    ],
)
def test_the_check_is_exact_for_any_size(ranks: RankPool, sizes: ExchangeSizes) -> None:
    for api in APIS:
        assert ranks.run(checks_on_rank, api, sizes, ("",)) == [[""]] * 4, api


def hierarchical_on_rank() -> None:
    two_hops = HierarchicalDispatcher(E, split_by_node(dist.group.WORLD, 2))
    for dtype in (torch.float32, torch.bfloat16):
        check_dispatcher(two_hops, dist.group.WORLD, SIZES, name="hierarchical", dtype=dtype)


def test_the_check_serves_the_hierarchical_dispatcher(ranks: RankPool) -> None:
    ranks.run(hierarchical_on_rank)


# ---- one exchange after another ---------------------------------------------------------------------------


def rows_alive_on_rank(api: str) -> list[bool]:
    """Whether the memory of what arrived is free when the graph is gone: after a backward, without one."""
    gc.disable()
    try:
        dispatcher, tokens = fused(double(api)), tokens_of(dist.get_rank(), "uneven")
        dead = []
        for backward in (True, False):
            x_TD = tokens["x"].t().contiguous().t().requires_grad_()  # rows that are not in one piece
            arrive = dispatcher.start(x_TD, Routing(tokens["ids"], tokens["weights"], torch.zeros(E)))
            dispatched = arrive()
            memory = StorageWeakRef(dispatched.x_RD.untyped_storage())
            y_TD = dispatcher.combine(dispatched.x_RD * 2, dispatched)
            if backward:
                y_TD.sum().backward()
            del arrive, dispatched, y_TD
            # gloo's own thread lets go of its work a moment after whoever waited for it.
            for _ in range(500):
                if memory.expired():
                    break
                time.sleep(0.01)
            dead.append(memory.expired())
        return dead
    finally:
        gc.enable()


@pytest.mark.parametrize("api", APIS)
def test_nothing_stays_in_memory(ranks: RankPool, api: str) -> None:
    assert ranks.run(rows_alive_on_rank, api) == [[True, True]] * 4


# ---- refusals ---------------------------------------------------------------------------------------------


def test_an_absent_package_is_refused_with_its_source_and_what_to_use_instead() -> None:
    for name, words in (("deepep", ("DeepEP (",)), ("hybridep", ("HybridEP (", "branch hybrid-ep"))):
        with pytest.raises(InputError) as caught:
            import_library(name)
        for word in (f"parallel.dispatcher={name}", "deep_ep", "sm_90", "hierarchical", "alltoall", *words):
            assert word in str(caught.value)


def test_another_generation_is_refused_by_what_it_lacks() -> None:
    with pytest.raises(InputError) as caught:
        require_api("hybridep", double("ElasticBuffer"))
    for word in ("hybridep", "deep_ep 2.1.0 lacks HybridEPBuffer;", "branch hybrid-ep"):
        assert word in str(caught.value)
    older = double("Buffer")

    class Buffer(older.Buffer):
        def combine(self, x: torch.Tensor, handle: object) -> None: ...

    older.Buffer = Buffer
    with pytest.raises(
        InputError, match=r"of unknown version lacks argument topk_weights of Buffer\.combine"
    ):
        require_api("deepep", older)


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(InputError, match=r"parallel\.dispatcher=deepep runs on CUDA only"):
        require_gpu("deepep", torch.device("cpu"))


def refusals_on_rank() -> list[str]:
    group = dist.group.WORLD
    odd = ExchangeSizes(hidden_size=36, num_experts=6, top_k=2, tokens_per_rank=8)
    torn = double("HybridEPBuffer")
    torn.HybridEPBuffer.ranks_per_domain = 2
    said = []
    for attempt in (
        lambda: fused(double("Buffer"), odd),  # 3 ranks
        lambda: build_carrier("deepep", double("ElasticBuffer"), group, odd),
        lambda: build_carrier("hybridep", double("HybridEPBuffer"), group, odd),
        lambda: fused(double("HybridEPBuffer"), replace(odd, hidden_size=48)),  # 2 experts on each of 3 ranks
        lambda: fused(torn, replace(odd, hidden_size=48, num_experts=12)),
    ):
        with pytest.raises(InputError) as caught:
            attempt()
        said.append(str(caught.value))
    return said


def test_groups_and_rows_without_kernels_are_refused(ranks: RankPool) -> None:
    for size, rows, chunks, experts, domains in ranks.run(refusals_on_rank, num_ranks=3):
        assert "no kernels for parallel.ep=3" in size
        assert "use one of 2, 4, 8, 16, 24, 32, 64, 128, 144, 160, or" in size
        assert "a multiple of 256 numbers, and model.hidden_size=36" in rows
        assert "a multiple of 16 numbers, and model.hidden_size=36" in chunks
        for text in (experts, domains):
            assert (
                "hybridep" in text and "parallel.ep=3" in text and "parallel.dispatcher=hierarchical" in text
            )
        assert "2 of model.num_experts=6" in experts and "a multiple of 4 experts" in experts
        assert "should be divisible by the number of ranks per node 2" in domains


def torn_node_on_rank() -> str:
    machine = f"node-{dist.get_rank() // 2}"
    with (
        patch("moe.layer.dispatch_deepep.platform.node", lambda: machine),
        pytest.raises(InputError) as caught,
    ):
        fused(double("Buffer"))
    return str(caught.value)


def test_ranks_that_the_library_takes_for_one_node_must_be_one(ranks: RankPool) -> None:
    for text in ranks.run(torn_node_on_rank):
        assert "ranks 0 to 3" in text and "node-0, node-1" in text
        assert "parallel.ep of at most 8 / parallel.etp" in text and "parallel.etp=1" in text


def misuse_on_rank() -> list[str]:
    dispatcher, plain = fused(double("Buffer")), AllToAllDispatcher(E, dist.group.WORLD)
    tokens = tokens_of(dist.get_rank(), "uneven")
    routing = Routing(
        tokens["ids"], tokens["weights"], tokens["ids"].clamp(0).flatten().bincount(minlength=E)
    )
    foreign = plain.dispatch(
        tokens["x"], Routing(tokens["ids"].clamp(0), tokens["weights"], routing.counts_E)
    )
    said = []
    for attempt in (
        lambda: dispatcher.start(tokens["x"].float(), routing),
        lambda: dispatcher.combine(tokens["x"], foreign),
        lambda: plain.combine(tokens["x"], dispatcher.dispatch(tokens["x"], routing)),
    ):
        with pytest.raises(ValueError) as caught:
            attempt()
        said.append(str(caught.value))
    return said


def test_other_rows_are_refused(ranks: RankPool) -> None:
    for said in ranks.run(misuse_on_rank):
        assert "sums rows in bf16 only, these are torch.float32" in said[0]
        assert "no library carried them" in said[1]
        assert "they carry no exchange" in said[2]
