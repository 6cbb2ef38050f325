"""token_rounding and capacity_limit against their references, bit by bit, and what the rules promise."""

from __future__ import annotations

import pytest
import torch
from gradients import gradients
from torch import Tensor

from moe.kernels.token_drop import capacity_limit, token_rounding
from moe.kernels.token_drop.reference import capacity_limit_reference, token_rounding_reference
from moe.kernels.topk_route import topk_route

pytestmark = pytest.mark.usefixtures("poison_empty")

BACKENDS = ("torch", "triton")
ROUNDINGS = ("down", "nearest")


def make_routing(T: int, E: int, K: int) -> tuple[Tensor, Tensor]:
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(T * E)) - torch.arange(E) / E
    ids_TK, weights_TK, _ = topk_route(logits_TE, K, renormalize=True)
    return ids_TK, weights_TK


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("tile", [1, 2, 3, 16, 1000])
@pytest.mark.parametrize("size", [(0, 4, 2), (1, 1, 1), (63, 5, 2), (100, 100, 8)], ids=str)
def test_equals_the_reference(size, tile, rounding, backend, triton_device):
    ids_TK, weights_TK = make_routing(*size)
    weights_TK = weights_TK.mul(8).round() / 8  # so that many are equal
    ids_TK[::5, -1] = -1
    ids_TK[::7, 0] = size[1] + 3
    options = {"rounding": rounding, "backend": backend}
    on_device = (ids_TK.to(triton_device), weights_TK.to(triton_device))
    actual = token_rounding(*on_device, size[1], tile, **options)
    expected = token_rounding_reference(ids_TK, weights_TK, size[1], tile, rounding=rounding)
    for name, a, e in zip(("ids", "weights", "counts"), actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a.cpu(), e), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capacity", [0, 1, 5, 1000])
@pytest.mark.parametrize("size", [(0, 4, 2), (63, 5, 2), (100, 100, 8)], ids=str)
def test_capacity_equals_the_reference(size, capacity, backend, triton_device):
    ids_TK, weights_TK = make_routing(*size)
    weights_TK = weights_TK.mul(8).round() / 8
    ids_TK[::5, -1] = -1
    on_device = (ids_TK.to(triton_device), weights_TK.to(triton_device))
    actual = capacity_limit(*on_device, size[1], capacity, backend=backend)
    expected = capacity_limit_reference(ids_TK, weights_TK, size[1], capacity)
    for name, a, e in zip(("ids", "weights", "counts"), actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a.cpu(), e), name
    assert int(actual[2].max()) <= capacity


def test_small_example():
    ids_TK = torch.tensor([[0], [0], [0], [1], [1], [2], [0], [1]])  # 4, 3 and 1 pairs
    weights_TK = torch.tensor([[0.5], [0.2], [0.3], [0.1], [0.4], [0.9], [0.2], [0.4]])
    ids, weights, counts_E = token_rounding(ids_TK, weights_TK, 3, 3, rounding="down")
    assert counts_E.tolist() == [3, 3, 0]  # of two pairs of 0.2 that of the later token goes
    assert ids.flatten().tolist() == [0, 0, 0, 1, 1, -1, -1, 1]
    assert torch.equal(weights, weights_TK.where(ids >= 0, 0))
    assert token_rounding(ids_TK, weights_TK, 3, 2)[2].tolist() == [4, 3, 1]  # half a tile is kept


def test_nearest_leaves_no_last_tile_less_than_half_full():
    ids_TK, weights_TK = make_routing(500, 16, 4)
    rests = {}
    for rounding in ROUNDINGS:
        ids, _, counts_E = token_rounding(ids_TK, weights_TK, 16, 32, rounding=rounding)
        assert torch.equal(ids[ids >= 0].bincount(minlength=16), counts_E)
        rests[rounding] = set((counts_E % 32).tolist())
    assert rests["down"] == {0}
    assert len(rests["nearest"]) > 1 and all(rest == 0 or rest >= 16 for rest in rests["nearest"])


def test_gradients_flow_to_the_weights_that_stay():
    ids_TK, weights_TK = make_routing(63, 5, 2)
    weights_TK.requires_grad_()
    ids, weights, _ = token_rounding(ids_TK, weights_TK, 5, 16, rounding="down")
    cotangent_TK = torch.randn(63, 2)
    grad_TK = gradients(weights, cotangent_TK, weights=weights_TK)["weights"]
    assert (ids < 0).any() and torch.equal(grad_TK, cotangent_TK.where(ids >= 0, 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_traces_one_graph(backend, triton_device):
    compiled = torch.compile(token_rounding, fullgraph=True, backend="aot_eager")
    for T in (63, 70):
        ids_TK, weights_TK = (x.to(triton_device) for x in make_routing(T, 5, 2))
        actual = compiled(ids_TK, weights_TK, 5, 16, backend=backend)
        assert all(map(torch.equal, actual, token_rounding(ids_TK, weights_TK, 5, 16, backend=backend)))


@pytest.mark.parametrize(
    ("shape", "tile", "rounding", "message"),
    [
        ((3, 1), 4, "down", r"must both be \[T, K\], got \(3, 2\) and \(3, 1\)"),
        ((3, 2), 0, "down", "tile=0 must be at least 1"),
        ((3, 2), 4, "up", "rounding='up' is unknown; allowed: down, nearest"),
    ],
)
def test_what_cannot_work_is_refused(shape, tile, rounding, message):
    with pytest.raises(ValueError, match=message):
        token_rounding(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(shape), 4, tile, rounding=rounding)


def test_a_negative_capacity_is_refused():
    with pytest.raises(ValueError, match="capacity=-1 must be 0 or more"):
        capacity_limit(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2), 4, -1)
