"""Tile sizes: the heuristic's bounds, and the file of tuned tiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe.kernels.grouped_gemm.tiles import (
    CACHE,
    KINDS,
    Sizes,
    Tile,
    cache_key,
    heuristic,
    tile_for,
    tuned_tiles,
)

SIZES = Sizes(rows=262144, experts=128, n=2048, k=768)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes", [SIZES, Sizes(1, 1, 1, 1), Sizes(40, 512, 33, 7), Sizes(10**7, 8, 7168, 2048)]
)
def test_tiles_fit_and_are_not_larger_than_the_sizes(sizes, kind):
    for element_bytes in (2, 4):
        for capability in (9, 10):
            tile = heuristic(kind, sizes, element_bytes, capability)
            for block in (tile.block_m, tile.block_n, tile.block_k):
                assert block >= 16 and block & (block - 1) == 0
            assert tile.block_n < 2 * max(16, sizes.n)
            buffers = (tile.num_stages + 1) // 2 if kind == "wgrad" else tile.num_stages
            assert 1 <= buffers <= 4
            assert buffers * (tile.block_m + tile.block_n) * tile.block_k * element_bytes <= 227 * 1024


def test_few_rows_an_expert_make_low_tiles():
    assert heuristic("gemm", SIZES, 2, 9).block_m == 128
    assert heuristic("gemm", Sizes(128 * 64, 128, 2048, 768), 2, 9).block_m == 32


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Writes the user's file of tuned tiles."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)

    def write(content: str) -> Path:
        path = tmp_path / CACHE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        tuned_tiles.cache_clear()
        return path

    yield write
    tuned_tiles.cache_clear()


def test_a_tuned_tile_is_used(tuned):
    like = torch.empty(1, dtype=torch.bfloat16)
    tile = Tile(64, 32, 16, 4, 3)
    tuned(json.dumps({cache_key("gemm", SIZES, torch.bfloat16, "interpreter"): [64, 32, 16, 4, 3]}))
    assert tile_for("gemm", SIZES, like) == tile
    # Of as many rows, within a factor of two; of another kind, dtype or width there is none.
    assert tile_for("gemm", Sizes(SIZES.rows - 1, 128, 2048, 768), like) == tile
    for other in (
        tile_for("up", SIZES, like),
        tile_for("gemm", SIZES, like.half()),
        tile_for("gemm", Sizes(SIZES.rows, 128, 1024, 768), like),
    ):
        assert other != tile


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "does not hold tuned tiles"),
        ("[]", "does not hold tuned tiles"),
        ('{"a": [1, 2]}', "does not hold tuned tiles"),
        ('{"a": [64, 64, 48, 4, 3]}', r"'a' has the impossible Tile\(.*block_k=48"),
        ('{"a": [64, 64, 64, 4, 99]}', "impossible .*num_stages=99"),
        ('{"a": [64, 64, "64", 4, 3]}', "impossible .*block_k='64'"),
    ],
)
def test_a_spoilt_file_is_refused(content, message, tuned):
    path = tuned(content)
    with pytest.raises(ValueError, match=message) as caught:
        tile_for("gemm", SIZES, torch.empty(1))
    assert str(path) in str(caught.value) and "tune again" in str(caught.value)
