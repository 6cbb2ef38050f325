"""How large a tile is: what was tuned on this kind of GPU, else a heuristic. No tuning during training.

`python -m benchmarks.tune_tiles` measures candidates on the GPU at hand and writes the best to CACHE; without
it the heuristic decides, and either way the first step of a job compiles one binary a kernel.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton
from torch import Tensor

# In the user's home, one file for all kinds of GPU.
CACHE = Path(".cache", "joulemoe", "tiles.json")
# What a block may use on sm_90 and sm_100, less some for what the compiler adds.
SHARED_BYTES = 200 * 1024
KINDS = ("up", "gemm", "grad_h", "wgrad")


@dataclass(frozen=True)
class Tile:
    """Sizes of a program's part of a matrix product, and how it is compiled.

    Attributes:
        block_m: rows of the output.
        block_n: columns of the output.
        block_k: length of one step of the sum.
        num_warps: of 32 threads.
        num_stages: steps in flight at once, where a gathered operand's row numbers are a step of their own.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Sizes:
    """Of a grouped product: out [R, N] summed over K; for wgrad out [e, M, N] summed over R.

    Attributes:
        rows: R.
        experts: e.
        n: columns of the output.
        k: length of the sum, for wgrad the rows M of the output.
    """

    rows: int
    experts: int
    n: int
    k: int


def tile_for(kind: str, sizes: Sizes, like: Tensor) -> Tile:
    """The tile of a kernel.

    Args:
        kind: of KINDS.
        sizes: of the product.
        like: an operand; its dtype and device count.

    Raises:
        ValueError: the tuned file is not one of ours.
        RuntimeError: as `capability_of`.
    """
    capability = capability_of(like)
    name = torch.cuda.get_device_name(like.device) if like.is_cuda else "interpreter"
    tuned = tuned_tiles(Path.home() / CACHE).get(cache_key(kind, sizes, like.dtype, name))
    return tuned or heuristic(kind, sizes, like.element_size(), capability)


def capability_of(like: Tensor) -> int:
    """Major compute capability of a tensor's GPU; 9 in the interpreter.

    Raises:
        RuntimeError: this Triton is known to compile grouped GEMMs wrong for this GPU.
    """
    capability = torch.cuda.get_device_capability(like.device)[0] if like.is_cuda else 9
    if capability >= 10 and triton.__version__.startswith(("3.4", "3.5", "3.6")):
        # triton#9871: loops with a bound known on the device only race on tensor memory.
        raise RuntimeError(
            f"triton {triton.__version__} compiles grouped GEMMs wrong for this GPU; install triton >= 3.7"
        )
    return capability


def heuristic(kind: str, sizes: Sizes, element_bytes: int, capability: int) -> Tile:
    """A tile that fits the registers and shared memory of sm_90 and sm_100, no larger than the sizes need.

    Args:
        kind: of KINDS.
        sizes: of the product.
        element_bytes: of an operand's element.
        capability: major; 9 for H100 and H200, 10 for B200.
    """
    # fp32 is computed without tensor cores, exact and slow, and rows that are not multiples of 16 bytes are
    # loaded number by number: large tiles of either spill.
    wide = element_bytes <= 2 and (sizes.n * element_bytes) % 16 == (sizes.k * element_bytes) % 16 == 0
    # triton 3.7 has computed 256 columns wrong on sm_100 (marin#7484): not before a B200 has shown ours
    # right. The dH kernel's epilogue needs the registers that 128 more columns would take.
    most_n = 64 if not wide else 128 if kind == "grad_h" or capability >= 10 else 256
    most_m = 128 if wide else 64
    # Half a tile of an expert is padding: its tiles are at most as high as half its rows on average.
    block_m = _fit(sizes.k if kind == "wgrad" else sizes.rows // sizes.experts // 2, most_m)
    block_n = _fit(sizes.n, most_n)
    block_k = _fit(sizes.rows if kind == "wgrad" else sizes.k, 64 if wide else 32)
    num_warps = 8 if block_m * block_n >= 128 * 128 else 4
    # Two blocks of dH share a processor: the long epilogue of one hides behind the other's sums.
    shared_bytes = SHARED_BYTES // 2 if kind == "grad_h" else SHARED_BYTES
    buffers = min(4, shared_bytes // ((block_m + block_n) * block_k * element_bytes))
    # In wgrad's loop the row numbers are loaded a step before the rows: three buffers are five stages.
    return Tile(block_m, block_n, block_k, num_warps, 2 * buffers - 1 if kind == "wgrad" else buffers)


def _fit(size: int, most: int) -> int:
    """A power of two that covers the size, from 16, the least that a tensor core takes, to `most`."""
    return min(most, max(16, 1 << max(0, size - 1).bit_length()))


def cache_key(kind: str, sizes: Sizes, dtype: torch.dtype, gpu: str) -> str:
    """Rows change from step to step, so only their order of magnitude counts."""
    rows = 1 << max(0, sizes.rows // sizes.experts - 1).bit_length()
    dtype_name = str(dtype).removeprefix("torch.")
    return f"{gpu} {dtype_name} {kind} rows={rows} experts={sizes.experts} n={sizes.n} k={sizes.k}"


@lru_cache(maxsize=1)
def tuned_tiles(path: Path) -> dict[str, Tile]:
    """The tuned tiles of a file by `cache_key`; none without a file.

    Raises:
        ValueError: for a file that does not hold tiles.
    """
    if not path.exists():
        return {}
    try:
        tiles = {key: Tile(*numbers) for key, numbers in json.loads(path.read_text(encoding="utf-8")).items()}
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} does not hold tuned tiles ({error}); delete it, or tune again") from error
    for key, tile in tiles.items():
        if not _can_launch(tile):
            raise ValueError(f"{path}: {key!r} has the impossible {tile}; delete the file, or tune again")
    return tiles


def _can_launch(tile: Tile) -> bool:
    blocks = (tile.block_m, tile.block_n, tile.block_k)
    return (
        all(isinstance(number, int) for number in astuple(tile))
        and all(16 <= block <= 512 and block & (block - 1) == 0 for block in blocks)
        and tile.num_warps in {1, 2, 4, 8, 16}
        and 1 <= tile.num_stages <= 12
    )


def launch_options(tile: Tile) -> dict[str, int]:
    """The constexprs and compile options of a launch."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
