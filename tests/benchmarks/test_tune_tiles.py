"""Tuning without a GPU: which tiles are tried and chosen, and that the kernels find what was written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import tune_tiles
from benchmarks.problem import make_problem
from benchmarks.shapes import Shape
from benchmarks.variants import leaves_of
from moe.kernels.expert_mlp import expert_mlp
from moe.kernels.grouped_gemm import tiles
from moe.kernels.grouped_gemm.tiles import KINDS, SHARED_BYTES, Sizes, Tile
from moe.kernels.permute_index import permute_index

FIRST, OTHER, THIRD = Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 4)
PRODUCT = {kind: tune_tiles.Product(kind, Sizes(4096, 8, 512, 256), lambda tile: None) for kind in KINDS}


@pytest.fixture(autouse=True)
def forget_what_was_read():
    yield
    tiles.tuned_tiles.cache_clear()


def test_the_fastest_tile_is_taken_if_it_is_worthwhile():
    assert tune_tiles.fastest({FIRST: 1.0, OTHER: 0.9, THIRD: 0.7}, FIRST) == THIRD
    assert tune_tiles.fastest({FIRST: 1.0, OTHER: 0.99}, FIRST) == FIRST
    assert tune_tiles.fastest({FIRST: 1.0, OTHER: 1.5}, FIRST) == FIRST


def test_kernels_find_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    like = torch.empty(1, dtype=torch.bfloat16)
    sizes = Sizes(4096, 8, 512, 256)
    key = tiles.cache_key("gemm", sizes, like.dtype, "interpreter")
    before = tiles.tile_for("gemm", sizes, like)
    assert before != THIRD
    tune_tiles.add_to_cache(tmp_path / tiles.CACHE, {key: THIRD})
    tiles.tuned_tiles.cache_clear()
    assert tiles.tile_for("gemm", sizes, like) == THIRD
    assert tiles.tile_for("wgrad", sizes, like) != THIRD


def test_other_tiles_in_the_file_stay(tmp_path: Path):
    path = tmp_path / "deep" / "tiles.json"
    tune_tiles.add_to_cache(path, {"H100 a": FIRST, "H100 b": FIRST})
    tune_tiles.add_to_cache(path, {"H100 b": OTHER, "B200 c": THIRD})
    assert tune_tiles.read_cache(path) == {"H100 a": FIRST, "H100 b": OTHER, "B200 c": THIRD}
    assert [file.name for file in path.parent.iterdir()] == ["tiles.json"]


def test_a_damaged_file_is_refused_and_kept(tmp_path: Path):
    path = tmp_path / "tiles.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="does not hold tuned tiles"):
        tune_tiles.add_to_cache(path, {"H100 a": FIRST})
    assert path.read_text() == "{"


@pytest.mark.parametrize("capability", [9, 10])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_fit_and_may_be_written(tmp_path: Path, kind, element_bytes, capability):
    found = list(tune_tiles.candidates(PRODUCT[kind], element_bytes, capability))
    assert 3 <= len(set(found)) == len(found) <= 30  # each is compiled: a minute for one kernel is enough
    for tile in found:
        buffers = (tile.num_stages + 1) // 2 if kind == "wgrad" else tile.num_stages
        assert buffers * (tile.block_m + tile.block_n) * tile.block_k * element_bytes <= SHARED_BYTES
        assert tile.block_n <= (128 if capability == 10 or kind == "grad_h" else 256)
        assert tile.block_m * tile.block_n <= 128 * 32 * tile.num_warps
    tune_tiles.add_to_cache(tmp_path / "tiles.json", {str(i): tile for i, tile in enumerate(found)})
    assert list(tune_tiles.read_cache(tmp_path / "tiles.json").values())


def test_the_six_products_run_with_any_tile(triton_device):
    shape = Shape(T=24, H=64, I=64, E=2, K=2)
    small, other = Tile(16, 64, 32, 4, 2), Tile(32, 64, 64, 4, 2)
    found = list(tune_tiles.products(make_problem(shape, torch.float32, triton_device)))
    assert [product.kind for product in found] == ["up", "gemm", "grad_h", "wgrad", "wgrad", "gemm"]
    for product in found:
        one, another = product.launch(small), product.launch(other)
        torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-4)
        assert tune_tiles.right_tiles(product, [small, other], torch.float32) == [small, other]


def test_what_is_tuned_is_what_the_layer_looks_up(triton_device, monkeypatch: pytest.MonkeyPatch):
    from moe.kernels.expert_mlp import triton_kernel as layer_kernels
    from moe.kernels.grouped_gemm import triton_kernel as gemm_kernels

    looked_up = []

    def recording(kind: str, sizes: Sizes, like: torch.Tensor) -> Tile:
        looked_up.append((kind, sizes))
        return tiles.tile_for(kind, sizes, like)

    for module in (layer_kernels, gemm_kernels):
        monkeypatch.setattr(module, "tile_for", recording)
    problem = make_problem(Shape(T=24, H=64, I=32, E=2, K=2), torch.float32, triton_device)
    index = permute_index(problem.ids_TK.flatten(), 2, backend="triton")
    leaves = leaves_of(problem.x_TD, problem.w_gate_up_EGD, problem.w_down_EDF, problem.weights_TK)
    expert_mlp(*leaves, index, backend="triton").sum().backward()
    tuned = {(product.kind, product.sizes) for product in tune_tiles.products(problem)}
    assert set(looked_up) == tuned


def test_a_tile_that_fails_or_computes_wrong_is_left_out(capsys):
    def launch(tile: Tile) -> torch.Tensor:
        if tile == THIRD:
            raise RuntimeError("out of resource: shared memory\nand more")
        return torch.ones(4, 4) * (1 if tile == FIRST else 1.1)

    product = tune_tiles.Product("gemm", Sizes(4, 1, 4, 4), launch)
    assert tune_tiles.right_tiles(product, [FIRST, OTHER, THIRD, FIRST], torch.bfloat16) == [FIRST]
    err = capsys.readouterr().err
    assert "is WRONG" in err
    assert "does not launch: out of resource: shared memory\n" in err


def test_without_a_gpu_nothing_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune_tiles", "--cache", str(tmp_path / "tiles.json")])
    with pytest.raises(SystemExit, match="2"):
        tune_tiles.main()
    assert "no GPU: torch" in capsys.readouterr().err
    assert not (tmp_path / "tiles.json").exists()
