"""The adaptations that let Megatron run without CUDA: scoped, undone, inert where CUDA exists."""

from __future__ import annotations

import pytest
import torch

from moe.engine.without_cuda import _replacements, without_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")


def names() -> list[object]:
    return [getattr(owner, name) for owner, name, _ in _replacements()]


def test_cuda_names_mean_the_cpu_inside_and_are_put_back() -> None:
    before = names()
    with without_cuda():
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1).to("cuda").device.type == "cpu"
        assert torch.zeros(1).cuda().device.type == "cpu"
        assert torch.cuda.current_device() == torch.device("cpu")
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert names() == before
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_it_is_undone_when_the_block_raises() -> None:
    before = names()
    with pytest.raises(KeyError), without_cuda():
        raise KeyError
    assert names() == before


def test_results_are_unchanged_inside() -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.softmax(x @ x.T, -1)
    with without_cuda():
        assert torch.equal(torch.softmax(x @ x.T, -1), expected)


def test_it_does_nothing_where_cuda_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    before = names()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with without_cuda():
        assert names() == before
