"""parallel.dispatcher and overlap in the engine: other ways of the same rows, the same training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fake_deep_ep import double
from ranks_pool import RankPool

from moe.config import load_config
from moe.errors import InputError
from moe.layer import AllToAllDispatcher, Dispatcher, ExpertTensorDispatcher, HierarchicalDispatcher
from moe.layer.dispatch_check import WrongDispatchError
from moe.layer.dispatch_fused import FusedDispatcher

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SETTINGS = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.vocab_size=96",
    "model.num_experts=8",
    "model.expert_hidden_size=16",
    "model.shared_expert_hidden_size=24",
    "model.attention.num_heads=4",
    "model.attention.head_dim=8",
    "data.seq_length=16",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "parallel.tp=2",
    "parallel.ep=4",
)


CHOSEN: dict[str, type[Dispatcher]] = {
    "alltoall": AllToAllDispatcher,
    "hierarchical": HierarchicalDispatcher,
    "deepep": FusedDispatcher,
    "hybridep": FusedDispatcher,
}


def require_chosen(engine: Any) -> None:
    """Every expert layer has the dispatcher of the config; those with split experts have it inside."""
    parallel = engine.config.parallel
    for adapter in engine.moe_layers.values():
        found = adapter.layer.dispatcher
        assert isinstance(found, ExpertTensorDispatcher) == (parallel.etp > 1)
        inner = found.inner if parallel.etp > 1 else found
        assert type(inner) is CHOSEN[parallel.dispatcher], type(inner)


def train(*overrides: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of three steps on this rank."""
    from moe.engine.megatron import MegatronEngine

    torch.set_num_threads(1)
    config = load_config(QUICKSTART, [*SETTINGS, *overrides], world_size=int(os.environ["WORLD_SIZE"]))
    engine = MegatronEngine(config)
    S, B, V = config.data.seq_length, config.train.micro_batch_size, config.model.vocab_size
    generator = torch.Generator().manual_seed(engine.dp_rank)

    def batches() -> Any:
        for _ in range(engine.num_microbatches):
            tokens = torch.randint(0, V, (B, S + 1), generator=generator)
            yield {
                "tokens_BS": tokens[:, :-1].contiguous(),
                "labels_BS": tokens[:, 1:].contiguous(),
                "loss_mask_BS": torch.ones(B, S),
                "position_ids_BS": torch.arange(S).expand(B, S),
            }

    try:
        require_chosen(engine)
        results = [engine.train_step(batches(), 3e-3) for _ in range(3)]
        return [(result.loss, result.grad_norm) for result in results]
    finally:
        engine.close()


@pytest.fixture(scope="module")
def plain(start_ranks: Any) -> tuple[RankPool, list[tuple[float, float]]]:
    pool: RankPool = start_ranks(4, init_process_group=False)
    return pool, pool.run(train)[0]


def test_two_hops_train_alike(plain: tuple[RankPool, list[tuple[float, float]]]) -> None:
    pool, expected = plain
    (found, *_) = pool.run(train, "parallel.dispatcher=hierarchical", "parallel.ranks_per_node=2")
    for step, (one, two) in enumerate(zip(found, expected, strict=True)):
        assert one == pytest.approx(two, rel=1e-5), f"step {step + 1}"


def groups_by_node(*overrides: str) -> tuple[int, int, set[float]]:
    """Layers with experts on this rank, different groups among theirs, and the waiting times of those."""
    from moe.engine.megatron import MegatronEngine

    config = load_config(QUICKSTART, [*SETTINGS, *overrides], world_size=int(os.environ["WORLD_SIZE"]))
    engine = MegatronEngine(config)
    try:
        layers = [adapter.groups.nodes for adapter in engine.moe_layers.values()]
        groups = {id(group): group for nodes in layers for group in (nodes.inside, nodes.across)}
        backends = (group._get_backend(torch.device("cpu")) for group in groups.values())
        return len(layers), len(groups), {each.options._timeout.total_seconds() for each in backends}
    finally:
        engine.close()


def test_all_chunks_share_the_groups_by_node_which_wait_as_long_as_others(
    plain: tuple[RankPool, list[tuple[float, float]]],
) -> None:
    chunks = ("model.num_layers=4", "model.num_dense_layers=0", "parallel.pp=2", "parallel.vpp=2")
    ranks = ("parallel.tp=1", "parallel.ep=2", "parallel.ranks_per_node=1", "engine.timeout_s=77")
    found = plain[0].run(groups_by_node, *chunks, *ranks, "parallel.dispatcher=hierarchical")
    assert found == [(2, 2, {77.0})] * 4


def test_overlap_trains_to_the_same_bits(plain: tuple[RankPool, list[tuple[float, float]]]) -> None:
    pool, expected = plain
    assert pool.run(train, "parallel.overlap_shared_expert=true")[0] == expected


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("parallel.dispatcher=deepep",),
            ("CUDA", "train.precision=fp32", "parallel.dispatcher=hierarchical"),
        ),
        (
            ("parallel.dispatcher=hierarchical", "parallel.ranks_per_node=4"),
            ("parallel.ep=4", "parallel.ranks_per_node=4", "parallel.dispatcher=alltoall"),
        ),
        (("parallel.dispatcher=hierarchical", "parallel.ranks_per_node=3"), ("two or more whole nodes",)),
    ],
)
def test_what_cannot_run_is_refused_before_start(overrides: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        load_config(QUICKSTART, [*SETTINGS, *overrides], world_size=4)
    for word in words:
        assert word in str(caught.value)


@contextmanager
def library(module: ModuleType) -> Iterator[None]:
    """A double in place of the package deep_ep, and of the GPU."""
    with (
        patch("moe.engine.fused_dispatcher.import_library", lambda _: module),
        patch("moe.engine.fused_dispatcher.require_gpu"),
    ):
        yield


def train_on_double(api: str, fault: str, *overrides: str) -> list[tuple[float, float]] | str:
    """As train, or the refusal; the buffers are freed while ranks can meet, and torch is left as it was."""
    module = double(api, fault)
    deterministic = "run.deterministic=true" in overrides
    torch.use_deterministic_algorithms(deterministic)
    try:
        with library(module):
            result: list[tuple[float, float]] | str = train(*overrides)
    except (WrongDispatchError, InputError) as error:
        result = str(error)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.utils.deterministic.fill_uninitialized_memory
    buffer = getattr(module, api)
    assert buffer.freed == ([True] if buffer.sends else []), "a stage without expert layers makes none"
    return result


@pytest.mark.parametrize(
    ("api", "overrides"),
    [
        ("Buffer", ("parallel.overlap_shared_expert=true",)),
        (
            "ElasticBuffer",
            (
                "run.deterministic=true",
                "parallel.ep=2",
                "parallel.etp=2",
                "train.recompute=full",
                "model.hidden_size=256",
            ),
        ),
        ("HybridEPBuffer", ("parallel.pp=2", "parallel.ep=2")),
    ],
)
def test_a_library_trains_alike(
    plain: tuple[RankPool, list[tuple[float, float]]], api: str, overrides: tuple[str, ...]
) -> None:
    pool, _ = plain
    name = "hybridep" if api == "HybridEPBuffer" else "deepep"
    settings = ("train.precision=bf16", *overrides)
    (expected, *_) = pool.run(train, *settings)
    (found, *_) = pool.run(train_on_double, api, "", f"parallel.dispatcher={name}", *settings)
    for step, (one, two) in enumerate(zip(found, expected, strict=True)):
        assert one == pytest.approx(two, rel=5e-3), f"step {step + 1}"


def test_a_library_that_loses_gradients_never_trains(
    plain: tuple[RankPool, list[tuple[float, float]]],
) -> None:
    settings = ("train.precision=bf16", "parallel.dispatcher=deepep")
    for text in plain[0].run(train_on_double, "Buffer", "gradients are zero", *settings):
        assert "deepep (deep_ep of unknown version) does not move rows" in text
        assert "the gradient of x" in text and "alltoall" in text


def test_a_library_that_is_not_here_ends_every_rank(
    plain: tuple[RankPool, list[tuple[float, float]]],
) -> None:
    settings = ("train.precision=bf16", "parallel.dispatcher=deepep")
    for text in plain[0].run(refusal_before_build, *settings):
        assert "rank 0: parallel.dispatcher=deepep needs the package deep_ep" in text


def refusal_before_build(*overrides: str) -> str:
    from moe.engine.megatron import MegatronEngine

    with patch.object(MegatronEngine, "_build", side_effect=AssertionError("the model was built first")):
        return refusal_on_rank(*overrides)


def refusal_on_rank(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        train(*overrides)
    return str(caught.value)


def refusal_on_unlike_machines(*overrides: str) -> str:
    machine = "1" if os.environ["RANK"] == "0" else "2"
    with patch.dict(os.environ, LOCAL_WORLD_SIZE=machine):
        return refusal_on_rank(*overrides)


def test_machines_with_unlike_numbers_of_ranks_end_every_rank(
    plain: tuple[RankPool, list[tuple[float, float]]],
) -> None:
    for text in plain[0].run(refusal_on_unlike_machines, "parallel.dispatcher=hierarchical"):
        assert "have 1, 2, 2, 2 on theirs; set parallel.ranks_per_node" in text


def test_launcher_with_one_node_is_told(plain: tuple[RankPool, list[tuple[float, float]]]) -> None:
    pool, _ = plain
    for text in pool.run(refusal_on_rank, "parallel.dispatcher=hierarchical"):
        assert "parallel.ranks_per_node=0, 4 were started here" in text
