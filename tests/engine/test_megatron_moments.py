"""What a checkpoint gathers has the bits of Megatron's own gathering, in slices of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from layouts import MODELS, OVERLAP, QUICKSTART, SIZES, Layout, batches, engine_with_small_buckets
from ranks_pool import RankPool
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe.config import load_config

AT_ONCE = 150  # elements; the last slices of shares are shorter


class _NewMemory(TorchDispatchMode):
    """Notes the bytes of every tensor that is not a view of what an operation was given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_of(one) for one in tree_leaves((args, kwargs)) if torch.is_tensor(one)}
        made = func(*args, **(kwargs or {}))
        fresh = [one for one in tree_leaves(made) if torch.is_tensor(one) and storage_of(one) not in given]
        self.sizes += [one.untyped_storage().nbytes() for one in fresh]
        return made


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def second_moments(part: Any) -> Iterator[None]:
    """Megatron asks for one of everything."""
    states = [state for state in part.optimizer.state.values() if "exp_avg_sq" not in state]
    for state in states:
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
    yield
    for state in states:
        del state["exp_avg_sq"]


def gather_both_ways(layout: Layout, optimizer: str) -> dict[str, Any]:
    """On one rank: parts compared, what differs from Megatron's, and what ours took."""
    from moe.engine import megatron_moments
    from moe.engine.megatron_optimizer import parts_of

    torch.set_num_threads(1)
    overrides = (*SIZES, *MODELS[layout.model], "train.precision=fp32", *layout.overrides)
    config = load_config(QUICKSTART, (*overrides, f"optim.name={optimizer}"), world_size=layout.num_ranks)
    engine = engine_with_small_buckets(config)
    found: dict[str, Any] = {"buffers": 0, "padded": False, "differing": [], "fresh": []}
    try:
        engine.train_step(batches(config, 0, engine.dp_rank, engine.layout.dp), lr=3e-3)
        for part in parts_of(engine.optimizer):
            with (
                patch.object(megatron_moments, "_ELEMENTS_AT_ONCE", AT_ONCE),
                patch.object(dist, "all_gather", wraps=dist.all_gather) as gather,
                _NewMemory() as memory,
            ):
                ours = megatron_moments.whole_states(part, empty_data=False, return_on_all_ranks=False)
            assert (gather.call_count > 0) == (part.data_parallel_group.size() > 1)
            assert (ours is not None) == (part.data_parallel_group.rank() == 0)
            kept = [
                whole.nbytes for by in (ours or {}).values() for of in by.values() for whole in of.values()
            ]
            for size in kept:
                memory.sizes.remove(size)
            found["fresh"] += memory.sizes
            with second_moments(part):
                theirs = part.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
            compare(part, ours, theirs, found)
    finally:
        engine.close()
    return found


def compare(part: Any, ours: Any, theirs: Any, found: dict[str, Any]) -> None:
    """Megatron's, which has no padding, with ours bucket by bucket."""
    for index, buffer in enumerate(part.buffers):
        found["padded"] |= any(one.numel_unpadded < one.grad_data.numel() for one in buffer.buckets[:-1])
        if ours is None:
            continue
        found["buffers"] += 1
        ((dtype, whole),) = ours[index].items()
        for name, values in whole.items():
            buckets = [values[one.offset : one.offset + one.numel_unpadded] for one in buffer.buckets]
            if not torch.equal(torch.cat(buckets), theirs[index][dtype][name]):
                found["differing"].append((index, dtype, name))


@pytest.fixture(scope="module")
def pool(start_ranks: Any) -> RankPool:
    ranks: RankPool = start_ranks(4, init_process_group=False)
    return ranks


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        (Layout("gqa", 2, f"precision=bf16 {OVERLAP}"), "muon"),
        (Layout("mla", 4, f"ep=4 {OVERLAP}"), "adamw"),
        (Layout("biased experts", 4, "tp=2 ep=2 etp=2 cp=2"), "muon"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_slices_have_the_bits_of_whole_buckets(pool: RankPool, layout: Layout, optimizer: str) -> None:
    found = pool.run(gather_both_ways, layout, optimizer, num_ranks=layout.num_ranks)
    assert [one["differing"] for one in found] == [[]] * layout.num_ranks
    assert sum(one["buffers"] for one in found) >= 2  # of dense parameters and of experts
    assert any(one["padded"] for one in found) == ("overlap" in layout.keys)
    # Beside the result, nothing is longer than what a collective may bring.
    assert all(max(one["fresh"]) <= 4 * AT_ONCE for one in found)
