"""How many kernels the experts launch in each precision, and that the host reads nothing back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from routed_pairs import ROUTINGS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from moe.kernels.permute_index import permute_index

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches of the interpreter")

D, F = 32, 128
MAPS = {"tile_map_kernel": 1}  # for each height of a tile
WIDE = (
    MAPS | {"up_kernel": 1, "grouped_gemm_kernel": 1, "sum_rows_kernel": 1},
    MAPS
    | {"grad_h_kernel": 1, "sum_partials_kernel": 1, "grouped_wgrad_kernel": 2}
    | {"grouped_gemm_kernel": 1, "sum_rows_kernel": 1},
)
FP8 = (
    {"quantize_weights_kernel": 2, "quantize_rows_kernel": 1}
    | {"tile_map_kernel": 1, "fp8_up_kernel": 1, "fp8_gemm_kernel": 1, "sum_rows_kernel": 1},
    {"quantize_weights_kernel": 2, "quantize_rows_kernel": 1, "quantize_columns_kernel": 2}
    | {"fp8_grad_h_kernel": 1, "sum_partials_kernel": 1, "fp8_wgrad_kernel": 2}
    | {"tile_map_kernel": 2, "fp8_gemm_kernel": 1, "sum_rows_kernel": 1},
)
MXFP8 = (
    {"quantize_rows_kernel": 3}
    | {"tile_map_kernel": 1, "mx_up_kernel": 1, "mx_gemm_kernel": 1, "sum_rows_kernel": 1},
    {"quantize_rows_kernel": 1, "quantize_columns_kernel": 4}
    | {"mx_grad_h_kernel": 1, "sum_partials_kernel": 1, "mx_wgrad_kernel": 2}
    | {"tile_map_kernel": 1, "mx_gemm_kernel": 1, "sum_rows_kernel": 1},
)


class ReadBacks(TorchDispatchMode):
    """Notes operations whose result is on the host: on a GPU each would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Kernels by name, as they are launched; the interpreter's own work is no part of the host's."""
    counted: Counter[str] = Counter()
    launch: Callable[..., Any] = GridExecutor.__call__

    def count(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        counted[self.fn.__name__] += 1
        with torch.utils._python_dispatch._disable_current_modes():
            launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", count)
    return counted


@pytest.mark.parametrize(
    ("file", "options", "expected"),
    [
        ("triton_kernel", {}, WIDE),
        ("fp8_triton", {"format": "fp8"}, FP8),
        ("fp8_triton", {"format": "mxfp8"}, MXFP8),
    ],
    ids=["wide", "fp8", "mxfp8"],
)
def test_a_step_launches_so_many_kernels_and_reads_nothing(file, options, expected, launches, triton_device):
    experts = import_module(f"moe.kernels.expert_mlp.{file}")
    E, ids_TK = ROUTINGS["sentinels"]
    index = permute_index(ids_TK.flatten(), E)
    inputs = tensors(E, *ids_TK.shape)
    compress = {"compress_h": False} if options else {}
    launches.clear()
    with ReadBacks() as read_backs:
        y_TD, h = experts.expert_mlp_fwd(*inputs, index, **options, **compress)
    assert (dict(launches), read_backs.found) == (expected[0], [])
    launches.clear()
    with ReadBacks() as read_backs:
        experts.expert_mlp_bwd(torch.ones_like(y_TD), inputs, index, h, **options)
    assert (dict(launches), read_backs.found) == (expected[1], [])


def test_a_read_back_is_noticed():
    with ReadBacks() as read_backs:
        torch.ones(3).sum().item()
    assert read_backs.found


def tensors(E: int, T: int, K: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((T, D), (E, 2 * F, D), (E, D, F))
    x, gate_up, down = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return x, gate_up, down, torch.rand(T, K, generator=generator)
