"""Measures tiles of the grouped products on the GPU at hand; the fastest are kept where the kernels look.

python -m benchmarks.tune_tiles --set qwen3-30b
python -m benchmarks.tune_tiles --shape 32768,4096,1024,128,8 --cache tiles.json     (a file to look at)

What other shapes and other kinds of GPU have in the file stays. Delete the file to go back to the heuristic.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import device_name, progress, require_device, time_interleaved_ms, whole, write_json
from benchmarks.problem import Problem, make_problem
from benchmarks.shapes import SETS, Shape, parse_shape, shapes_of
from benchmarks.verdict import LARGEST_DIFFERENCE, Errors
from moe.kernels.grouped_gemm.tiles import (
    CACHE,
    SHARED_BYTES,
    Sizes,
    Tile,
    cache_key,
    heuristic,
    tuned_tiles,
)
from moe.kernels.permute_index import permute_index

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A tile replaces the heuristic's if it is faster by more than the noise of a median.
WORTHWHILE = 0.02
# fp32 sums of a tile in the registers of one thread; more of them spill.
MOST_SUMS = 128


@dataclass(frozen=True)
class Product:
    """One kernel of the layer's forward or backward.

    Attributes:
        kind: of KINDS.
        sizes: as its launcher looks its tile up.
        launch: runs it with a tile and returns what it wrote.
    """

    kind: str
    sizes: Sizes
    launch: Callable[[Tile], Tensor]


def main() -> int:
    """Parse argv, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    parser.add_argument(
        "--shape", type=parse_shape, action="append", metavar="T,H,I,E,K", help="may be repeated"
    )
    parser.add_argument("--set", choices=SETS, action="append", help="named shapes; may be repeated")
    parser.add_argument("--seconds", type=float, default=1.5, help="to time the tiles of one kernel")
    parser.add_argument("--cache", type=Path, default=Path.home() / CACHE, help="default: %(default)s")
    args = parser.parse_args()
    require_device("cuda")
    for shape in shapes_of("cuda", args.shape, args.set or (None if args.shape else ["qwen3-30b"])):
        progress(f"{shape} {args.dtype} on {device_name('cuda')}")
        # After every shape: who is stopped early keeps what was measured.
        add_to_cache(args.cache, tune(shape, DTYPES[args.dtype], seconds=args.seconds))
    print(f"{len(read_cache(args.cache))} tiles are in {args.cache}")
    return 0


def tune(shape: Shape, dtype: torch.dtype, *, seconds: float) -> dict[str, Tile]:
    """The fastest tile of each kernel of a layer, by cache_key."""
    gpu, capability = device_name("cuda"), torch.cuda.get_device_capability()[0]
    tuned = {}
    for product in products(make_problem(shape, dtype, "cuda")):
        first = heuristic(product.kind, product.sizes, dtype.itemsize, capability)
        tiles = right_tiles(product, [first, *candidates(product, dtype.itemsize, capability)], dtype)
        times_ms = time_tiles(product, tiles, seconds=seconds)
        best = fastest(times_ms, first)
        progress(f"  {product.kind} n={product.sizes.n} k={product.sizes.k}: {times_ms[first]:.3f} ms with")
        progress(f"    {first}, {times_ms[best]:.3f} ms with {best}")
        tuned[cache_key(product.kind, product.sizes, dtype, gpu)] = best
    return tuned


def products(problem: Problem) -> Iterator[Product]:
    """The six grouped products of a layer, on random operands."""
    # Not at the top: the file must be importable where Triton is not.
    from moe.kernels.expert_mlp.triton_kernel import launch_grad_h, launch_up
    from moe.kernels.grouped_gemm.triton_kernel import TileMaps, launch_grouped_gemm, launch_grouped_wgrad

    N, H, I, E, K = (problem.shape.pairs, *astuple(problem.shape)[1:])
    x_TD, grad_TD, gate_up, down = problem.x_TD, problem.grad_TD, problem.w_gate_up_EGD, problem.w_down_EDF
    order_N, _, ends_E = permute_index(problem.ids_TK.flatten(), E)
    maps = TileMaps(ends_E, N)
    h_NG = torch.randn(N, 2 * I, dtype=x_TD.dtype, device=x_TD.device)
    a_NF = h_NG[:, :I].contiguous()
    inputs = (x_TD, gate_up, down, problem.weights_TK)
    yield Product(
        "up", Sizes(N, E, 2 * I, H), lambda tile: launch_up(x_TD, gate_up, order_N, maps, K, tile=tile)[0]
    )
    yield Product(
        "gemm",
        Sizes(N, E, H, I),
        lambda tile: launch_grouped_gemm(a_NF, down, maps, w_is_nk=True, tile=tile),
    )
    yield Product(
        "grad_h",
        Sizes(N, E, I, H),
        lambda tile: launch_grad_h(grad_TD, inputs, order_N, h_NG, maps, tile=tile)[0],
    )
    wgrad = partial(launch_grouped_wgrad, maps=maps, top_k=K)
    yield Product(
        "wgrad", Sizes(N, E, I, H), lambda tile: wgrad(grad_TD, a_NF, order_left_R=order_N, tile=tile)
    )
    yield Product(
        "wgrad", Sizes(N, E, H, 2 * I), lambda tile: wgrad(h_NG, x_TD, order_right_R=order_N, tile=tile)
    )
    yield Product(
        "gemm",
        Sizes(N, E, H, 2 * I),
        lambda tile: launch_grouped_gemm(h_NG, gate_up, maps, w_is_nk=False, tile=tile),
    )


def candidates(product: Product, element_bytes: int, capability: int) -> Iterator[Tile]:
    """Tiles that may be faster than the heuristic's: their sums and buffers fit."""
    blocks = (64, 128) if element_bytes == 4 else (64, 128, 256)
    # 256 columns: see heuristic.
    most_n = 128 if capability >= 10 or product.kind == "grad_h" else 256
    steps = (32,) if element_bytes == 4 else (64, 128)
    for m, n, k, warps in itertools.product(blocks, blocks, steps, (4, 8)):
        stages = min(5, SHARED_BYTES // ((m + n) * k * element_bytes))
        if n <= most_n and m * n <= MOST_SUMS * 32 * warps and m * n >= 64 * 128 and stages >= 2:
            yield Tile(m, n, k, warps, 2 * stages - 1 if product.kind == "wgrad" else stages)


def right_tiles(product: Product, tiles: list[Tile], dtype: torch.dtype) -> list[Tile]:
    """The first tile, the heuristic's, and those of the others that launch and give what it gives."""
    expected = product.launch(tiles[0])
    right = tiles[:1]
    for tile in dict.fromkeys(tiles[1:]):
        if tile == tiles[0]:
            continue
        try:
            found = product.launch(tile)
        except RuntimeError as error:  # Triton's: too much shared memory or too many registers
            progress(f"    {tile} does not launch: {str(error).partition(chr(10))[0]}")
            continue
        errors = Errors()
        errors.add(found, expected.float())
        if errors.difference < LARGEST_DIFFERENCE[dtype]:
            right.append(tile)
        else:
            progress(f"    {tile} is WRONG, by {errors.difference:.3g}")
    return right


def time_tiles(product: Product, tiles: list[Tile], *, seconds: float) -> dict[Tile, float]:
    """Median milliseconds of each tile."""
    steps = {tile: whole(partial(product.launch, tile)) for tile in tiles}
    samples = time_interleaved_ms(steps, budget_s=seconds, device="cuda")
    return {tile: statistics.median(ms for (ms,) in laps) for tile, laps in samples.items()}


def fastest(times_ms: Mapping[Tile, float], first: Tile) -> Tile:
    """The fastest tile, but `first` if that one is hardly slower."""
    best = min(times_ms, key=lambda tile: times_ms[tile])
    return best if times_ms[best] < (1 - WORTHWHILE) * times_ms[first] else first


def read_cache(path: Path) -> dict[str, Tile]:
    """The tiles in a file now.

    Raises:
        ValueError: for a file that does not hold tiles.
    """
    tuned_tiles.cache_clear()
    return dict(tuned_tiles(path))


def add_to_cache(path: Path, tuned: Mapping[str, Tile]) -> None:
    """Put these tiles into the file, which is replaced in one step."""
    merged = read_cache(path) | dict(tuned)
    write_json(path, {key: astuple(tile) for key, tile in sorted(merged.items())})


if __name__ == "__main__":
    sys.exit(main())
