"""permute_index's Triton backend: the interpreter (or a GPU) against the reference."""

from __future__ import annotations

import pytest
import torch

from moe.kernels.permute_index import pad_to_tiles, permute_index
from moe.kernels.permute_index.reference import pad_to_tiles_reference, permute_index_reference

pytestmark = pytest.mark.usefixtures("poison_empty")


def ids_of(kind: str, N: int, E: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(N * E)
    uniform_N = torch.randint(E, (N,), generator=generator)
    coin_N = torch.rand(N, generator=generator)
    sentinels_N = torch.where(coin_N < 0.05, -1, torch.where(coin_N < 0.1, E, 2**40))
    return {
        "uniform": uniform_N,
        "hot_expert": torch.where(coin_N < 0.9, E // 2, uniform_N),
        "one_expert": torch.full_like(uniform_N, E - 1),
        "odd_experts_empty": uniform_N // 2 * 2,
        "with_sentinels": torch.where(coin_N < 0.15, sentinels_N, uniform_N),
        "only_sentinels": sentinels_N,
    }[kind]


# N, E and the routing.
PADDED = [(0, 3, "uniform"), (1, 1, "uniform"), (7, 100, "uniform"), (63, 3, "with_sentinels")]
PADDED += [(504, 16, "odd_experts_empty"), (504, 16, "hot_expert"), (40, 16, "only_sentinels")]


def assert_same_bits(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for name, a, e in zip(("order", "inverse", "ends"), actual, expected, strict=True):
        assert a.dtype == e.dtype == (torch.int32 if name == "ends" else torch.int64), name
        assert torch.equal(a.cpu(), e.cpu()), name


@pytest.mark.parametrize("E", [1, 3, 16, 100, 256, 1024])
@pytest.mark.parametrize("N", [0, 1, 7, 63, 1000, 4096])
def test_equals_the_reference(N, E, triton_device):
    ids_N = ids_of("with_sentinels", N, E)
    actual = permute_index(ids_N.to(triton_device), E, backend="triton")
    assert_same_bits(actual, permute_index_reference(ids_N, E))


@pytest.mark.parametrize(
    "kind", ["uniform", "hot_expert", "one_expert", "odd_experts_empty", "only_sentinels"]
)
@pytest.mark.parametrize("E", [16, 1024])
def test_equals_the_reference_for_every_kind_of_routing(E, kind, triton_device):
    ids_N = ids_of(kind, 1000, E)
    actual = permute_index(ids_N.to(triton_device), E, backend="triton")
    assert_same_bits(actual, permute_index_reference(ids_N, E))


def test_reruns_are_bit_equal(triton_device):
    ids_N = ids_of("with_sentinels", 2000, 100).to(triton_device)
    first = permute_index(ids_N, 100, backend="triton")
    for _ in range(2):
        assert_same_bits(permute_index(ids_N, 100, backend="triton"), first)


def test_every_second_element_of_a_tensor_will_do(triton_device):
    ids_N = ids_of("with_sentinels", 126, 16).to(triton_device)[::2]
    actual = permute_index(ids_N, 16, backend="triton")
    assert_same_bits(actual, permute_index_reference(ids_N, 16))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("tile", [1, 3, 16, 128])
@pytest.mark.parametrize("case", PADDED, ids=str)
def test_padding_equals_the_reference(case, tile, backend, triton_device):
    N, E, kind = case
    ends_E = permute_index_reference(ids_of(kind, N, E), E)[2]
    rows_P, padded_ends_E = pad_to_tiles(ends_E.to(triton_device), N, tile, backend=backend)
    expected_rows_P, expected_ends_E = pad_to_tiles_reference(ends_E, N, tile)
    assert rows_P.dtype == torch.int64 and torch.equal(rows_P.cpu(), expected_rows_P)
    assert padded_ends_E.dtype == torch.int32 and torch.equal(padded_ends_E.cpu(), expected_ends_E)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_padding_traces_as_one_graph(backend, triton_device):
    compiled = torch.compile(pad_to_tiles, fullgraph=True, backend="aot_eager")
    for N in (63, 100):
        ends_E = permute_index_reference(ids_of("uniform", N, 16), 16)[2].to(triton_device)
        actual = compiled(ends_E, N, 16, backend=backend)
        assert all(map(torch.equal, actual, pad_to_tiles_reference(ends_E, N, 16)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile_traces_one_graph(backend, triton_device):
    compiled = torch.compile(permute_index, fullgraph=True, backend="aot_eager")
    for N in (63, 100):  # the second size makes the shape dynamic
        ids_N = ids_of("with_sentinels", N, 16)
        actual = compiled(ids_N.to(triton_device), 16, backend=backend)
        assert_same_bits(actual, permute_index_reference(ids_N, 16))


def test_custom_op_keeps_torchs_rules(triton_device):
    ids_N = ids_of("with_sentinels", 100, 16).to(triton_device)
    torch.library.opcheck(torch.ops.joulemoe.permute_index.default, (ids_N, 16))
    ends_E = permute_index(ids_N, 16, backend="triton")[2]
    pad_to_tiles(ends_E, 100, 8, backend="triton")  # registers the operator
    torch.library.opcheck(torch.ops.joulemoe.pad_to_tiles.default, (ends_E, 208, 8))
