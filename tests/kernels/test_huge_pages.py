"""Large tensors of the CPU backend are in huge pages: their first touch is cheap."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from moe.kernels.expert_mlp.huge_pages import HUGE_PAGE_BYTES, empty_in_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SMALL_PAGES = 16 * HUGE_PAGE_BYTES // resource.getpagesize()


def first_touch_faults(tensor: torch.Tensor) -> int:
    """Page faults of writing to all of it once."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensor.zero_()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this kernel gives no huge pages"
)
def test_a_large_tensor_costs_few_page_faults() -> None:
    tensor = empty_in_huge_pages(torch.empty(0, dtype=torch.uint8), 16, HUGE_PAGE_BYTES)
    assert first_touch_faults(tensor) < 0.1 * SMALL_PAGES


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(0, 7), (3, 5), (1031, 1033, 2)])
def test_size_and_dtype_are_those_asked_for(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    tensor = empty_in_huge_pages(torch.empty(2, dtype=dtype), *sizes)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (sizes, dtype, True)
    assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert torch.all(tensor.fill_(3) == 3)


def test_memory_lives_as_long_as_a_view_of_it() -> None:
    view = empty_in_huge_pages(torch.empty(0), 1024, 1024).fill_(5)[7:9]
    again = empty_in_huge_pages(torch.empty(0), 1024, 1024).zero_()
    assert view.sum() == 5 * 2 * 1024 and again.sum() == 0
