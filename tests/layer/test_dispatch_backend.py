"""Dispatch, experts and combine use the backend that they are given, and all backends agree."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gradients import gradients
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from moe.layer import AllToAllDispatcher, GroupedExperts, LocalDispatcher, MoEConfig, Routing

D, F, E, K, T = 5, 6, 8, 2, 7
Named = dict[str, torch.Tensor]


class CountOurOps(TorchDispatchMode):
    """Counts the custom operators that run; plain torch calls none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "joulemoe":
            self.calls[op.name().removeprefix("joulemoe::")] += 1
        return op(*args, **(kwargs or {}))


def there_and_back(
    dispatcher: Any, num_local_experts: int, seed: int, device: str
) -> tuple[Named, Counter[str]]:
    """y, the gradients, and our operators; tokens and ids are the seed's."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :K].to(device)
    x_TD, cotangent_TD = torch.randn(2, T, D, generator=generator).to(device)
    weights_TK = torch.rand(T, K, generator=generator).to(device).requires_grad_()
    x_TD.requires_grad_()
    # The same expert everywhere, so that it does not matter which rank has which.
    config = MoEConfig(
        hidden_size=D, num_experts=E, top_k=K, expert_hidden_size=F, backend=dispatcher.backend
    )
    experts = GroupedExperts(config, num_local_experts, device=device)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(torch.randn(weight.shape[1:], generator=generator.manual_seed(7)))
    routing = Routing(ids_TK, weights_TK, ids_TK.flatten().bincount(minlength=E))
    with CountOurOps() as ours:
        dispatched = dispatcher.dispatch(x_TD, routing)
        y_TD = dispatcher.combine(experts(dispatched.x_RD, dispatched), dispatched)
    return {"y": y_TD.detach(), **gradients(y_TD, cotangent_TD, x=x_TD, weights=weights_TK)}, ours.calls


def on_rank(backend: str) -> tuple[Named, Counter[str]]:
    from triton_interpreter import install

    install()
    return there_and_back(
        AllToAllDispatcher(E, dist.group.WORLD, backend=backend), E // 2, dist.get_rank(), "cpu"
    )


def test_one_rank(triton_device):
    (actual, ours), (expected, none) = (
        there_and_back(LocalDispatcher(E, backend=backend), E, 0, triton_device)
        for backend in ("triton", "torch")
    )
    assert ours == {"permute_index": 1, "expert_mlp": 1}
    assert none == {"expert_mlp": 1}
    for name, tensor in expected.items():
        assert_close(name, actual[name], tensor)


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks over gloo hold CPU tensors: the interpreter's")
def test_two_ranks(start_ranks):
    results = start_ranks(2).run(on_rank, "triton")
    for rank, (actual, ours) in enumerate(results):
        assert ours == {"permute_index": 2, "permute": 2, "expert_mlp": 1, "unpermute": 1}
        expected, _ = there_and_back(LocalDispatcher(E, backend="torch"), E, rank, "cpu")
        for name, tensor in expected.items():
            assert_close(f"{name} of rank {rank}", actual[name], tensor)
