"""How many kernels the experts launch in each precision, and that the host reads nothing back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any, Self

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
# Neither X nor dO is quantised by rows, nor the weights that they are multiplied with.
FP8_AND_WIDE = (
    {"quantize_weights_kernel": 1, "fp8_up_kernel": 1, "fp8_gemm_kernel": 1, "sum_rows_kernel": 1}
    | {"tile_map_kernel": 2},
    {"quantize_weights_kernel": 1, "quantize_columns_kernel": 2}
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
    """Notes what puts a result on the host, or needs it there: on a GPU each would wait for it."""

    OPERATORS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal"})
    METHODS = ("tolist", "cpu", "numpy", "to")  # on the CPU they call no operator

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = args[1] if name in {"index", "index_put", "index_put_"} else ()
        is_masked = any(mask is not None and mask.dtype in {torch.bool, torch.uint8} for mask in masks)
        if name in self.OPERATORS or is_masked:
            self.found.append(name)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Self:
        self._patches = pytest.MonkeyPatch()
        for method in self.METHODS:
            self._patches.setattr(Tensor, method, self._noting(method))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.undo()
        super().__exit__(*error)

    def _noting(self, method: str) -> Callable[..., Any]:
        call = getattr(Tensor, method)

        def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            target = [*args, *kwargs.values()]
            to_host = any(isinstance(each, str | torch.device) and "cpu" in str(each) for each in target)
            in_mode = torch.utils._python_dispatch._get_current_dispatch_mode() is self
            if in_mode and (method != "to" or to_host):
                self.found.append(method)
            return call(tensor, *args, **kwargs)

        return noted


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
        ("fp8_triton", {"format": "fp8", "wide_into_activation": True}, FP8_AND_WIDE),
        ("fp8_triton", {"format": "mxfp8"}, MXFP8),
    ],
    ids=["wide", "fp8", "fp8_and_wide", "mxfp8"],
)
def test_a_step_launches_so_many_kernels_and_reads_nothing(file, options, expected, launches, triton_device):
    experts = import_module(f"moe.kernels.expert_mlp.{file}")
    E, ids_TK = ROUTINGS["sentinels"]
    index = permute_index(ids_TK.flatten(), E)
    inputs = tensors(E, *ids_TK.shape)
    if options:
        options = {"wide_into_activation": False} | options
    compress = {"compress_h": False} if options else {}
    launches.clear()
    with ReadBacks() as read_backs:
        y_TD, h = experts.expert_mlp_fwd(*inputs, index, **options, **compress)
    assert (dict(launches), read_backs.found) == (expected[0], [])
    launches.clear()
    with ReadBacks() as read_backs:
        experts.expert_mlp_bwd(torch.ones_like(y_TD), inputs, index, h, **options)
    assert (dict(launches), read_backs.found) == (expected[1], [])


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: int(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.to("cpu"),
        lambda x: x.to(device=torch.device("cpu")),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.masked_select(x > 1),
        lambda x: x[x > 1],
        lambda x: x.index_put_((x > 1,), torch.ones(2, dtype=int)),
    ],
    ids=[
        "item",
        "int",
        "bool",
        "tolist",
        "cpu",
        "numpy",
        "to",
        "to_device",
        "nonzero",
        "equal",
        "masked_select",
        "mask",
        "put_by_mask",
    ],
)
def test_a_read_back_is_noticed(read):
    x = torch.arange(4)
    with ReadBacks() as read_backs:
        read(x)
    assert read_backs.found


def test_what_stays_on_the_device_is_no_read_back():
    x = torch.arange(4)
    with ReadBacks() as read_backs:
        x.to(torch.int32).sum(), x[x.flip(0)], torch.where(x > 1, x, 0)
    assert read_backs.found == []


def tensors(E: int, T: int, K: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((T, D), (E, 2 * F, D), (E, D, F))
    x, gate_up, down = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return x, gate_up, down, torch.rand(T, K, generator=generator)
