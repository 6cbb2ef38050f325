"""The router, the index of pairs, and rows into expert order and back, as training launches them."""

from __future__ import annotations

from collections.abc import Iterator

from shipped_request import CAPABILITIES, FP32, INT32, INT64, Asked, request

from moe.kernels.combine import triton_kernel as combine
from moe.kernels.permute_index import triton_kernel as permute_index
from moe.kernels.topk_route import triton_launch as topk_route

# E and K of models from 64 to 1024 experts.
FORWARD = [(64, 6), (128, 8), (256, 8), (384, 8), (512, 10), (1024, 16)]
BACKWARD = [(64, 6), (128, 8), (384, 8), (1024, 16)]
# With the sums of router losses: E, K, and groups as DeepSeek-V3 has them.
WITH_SUMS = [(128, 8, (1, 1)), (256, 8, (8, 4)), (512, 10, (1, 1)), (1024, 16, (1, 1))]
RANKED_AND_WEIGHTED = [
    ("logits", "softmax_of_chosen"),
    ("sigmoid", "sigmoid_share"),
    ("softmax", "softmax_of_all"),
    ("sigmoid", "sigmoid"),
]
# K and D; the last has rows that are not aligned.
ROWS = [(8, 2048), (2, 4096), (8, 7168), (8, 2047)]


def asked() -> Iterator[Asked]:
    """Modes and dtypes take turns, so that each architecture sees other pairs."""
    for turn, capability in enumerate(CAPABILITIES):
        yield from routed(turn, capability)
        yield from routed_with_sums(turn, capability)
        yield from indexed(capability)
        for i, (K, D) in enumerate(ROWS, turn):
            yield from moved(K, D, ("bf16", "fp32")[i % 2], capability)


def routed(turn: int, capability: int) -> Iterator[Asked]:
    for i, (E, K) in enumerate(FORWARD, turn):
        dtype = ("fp32", "bf16")[i // 2 % 2]
        yield route(E, K, RANKED_AND_WEIGHTED[i % 4], dtype=dtype, capability=capability)
    for i, (E, K) in enumerate(BACKWARD, 2 * turn):
        dtype = ("bf16", "fp32")[i % 2]
        yield route_backward(E, K, RANKED_AND_WEIGHTED[i % 4][1], dtype=dtype, capability=capability)
    # DeepSeek-V3: 8 groups, of which 4.
    yield route(256, 8, RANKED_AND_WEIGHTED[1], (8, 4), dtype="fp32", capability=capability)


def routed_with_sums(turn: int, capability: int) -> Iterator[Asked]:
    for i, (E, K, groups) in enumerate(WITH_SUMS, turn):
        ranked_and_weighted = RANKED_AND_WEIGHTED[1 if groups != (1, 1) else i % 3]
        sums_of = "sigmoid" if "sigmoid" in ranked_and_weighted else "softmax"
        target = {"sums_of": sums_of, "dtype": "fp32", "capability": capability}
        yield route(E, K, ranked_and_weighted, groups, **target)
        yield route_backward(E, K, ranked_and_weighted[1], **target)


def route(
    E: int,
    K: int,
    ranked_and_weighted: tuple[str, str],
    groups: tuple[int, int] = (1, 1),
    *,
    sums_of: str | None = None,
    dtype: str,
    capability: int,
) -> Asked:
    choice, weighting = ranked_and_weighted
    modes = {"choice": choice, "weighting": weighting, "sums_of": sums_of}
    modes |= dict(zip(("num_groups", "top_groups"), groups, strict=True))
    # As rounds_of_blocks: Triton compiles for an argument that is one.
    has_rounds = sums_of is not None and E <= 512
    arguments = {
        "logits_ptr": f"*{dtype}:16",
        "bias_ptr": None if choice == "logits" else FP32,
        "ids_ptr": INT64,
        "weights_ptr": FP32,
        "counts_ptr": INT64,
        "sums_ptr": FP32 if sums_of else None,
        "T": "i32",
        "num_sequences": "i32",
        "num_rounds": "i32" if has_rounds else 1,
        "scale": "fp32",
        "num_warps": topk_route.NUM_WARPS,
        **topk_route.forward_constants(E, K, **modes),
    }
    # A row's largest key in one instruction, which sm_100 calls CREDUX.
    largest = () if sums_of else ("REDUX" if capability == 90 else "CREDUX",)
    return of_router("ids, weights, counts", "fwd", (E, K), arguments, capability, instructions=largest)


def route_backward(
    E: int, K: int, weighting: str, *, sums_of: str | None = None, dtype: str, capability: int
) -> Asked:
    arguments = {
        "grad_weights_ptr": FP32,
        "grad_sums_ptr": FP32,
        "logits_ptr": f"*{dtype}:16",
        "ids_ptr": INT64,
        "grad_logits_ptr": f"*{dtype}:16",
        "T": "i32",
        "num_sequences": "i32",
        "scale": "fp32",
        "num_warps": topk_route.NUM_WARPS,
        **topk_route.backward_constants(E, K, weighting, sums_of),
    }
    return of_router("dlogits", "bwd", (E, K), arguments, capability)


def of_router(
    product: str,
    direction: str,
    sizes: tuple[int, int],
    arguments: dict[str, object],
    capability: int,
    *,
    instructions: tuple[str, ...] = (),
) -> Asked:
    E, K = sizes
    with_sums = arguments["SUMS_OF"] is not None
    found = request("topk_route/triton_kernel.py", f"topk_route_{direction}_kernel", arguments, capability)
    return Asked(
        f"{product}, sums of losses" if with_sums else product,
        f"{E} experts, top {K}",
        str(arguments["logits_ptr"])[1:5],
        found,
        max_registers=208 if with_sums else 168,
        instructions=instructions,
        counts_atomically=direction == "fwd",
    )


def indexed(capability: int) -> Iterator[Asked]:
    file, sizes = "permute_index/triton_kernel.py", {"N": "i32", "E": "i32"}
    block = {"BLOCK": permute_index.BLOCK, "num_warps": permute_index.NUM_WARPS}
    rank = {"p_ids": INT64, "p_ranks": INT64, "p_counts": INT32} | sizes | block
    place = {"p_ids": INT64, "p_order": INT64, "p_inverse": INT64, "p_running": INT32} | sizes | block
    pad = {"p_ends": INT32, "p_rows": INT64, "p_padded_ends": INT32, "E": "i32", "P": "i32"}
    experts, tile = {90: (128, 128), 100: (1024, 16)}[capability]
    pad |= {"E_PAD": experts, "TILE": tile, "TILE_PAD": tile}
    for product, function, arguments in (
        ("ranks in a tile", "rank_in_tile_kernel", rank),
        ("order, inverse", "place_kernel", place),
        ("rows padded to tiles", "pad_to_tiles_kernel", pad),
    ):
        yield Asked(product, "any", "int64", request(file, function, arguments, capability), max_registers=64)


def moved(K: int, D: int, dtype: str, capability: int) -> Iterator[Asked]:
    """Copies and sums of rows, sums with weights and without."""
    rows = f"*{dtype}:16"
    common = {"p_inverse": INT64, "T": "i32", "num_warps": combine.NUM_WARPS} | combine.constants_for(K, D)
    sums = common | {"p_y": rows, "p_out": rows, "p_end": "*i32"}
    backward = common | {"p_grad": rows, "p_y": rows, "p_weights": FP32}
    backward |= {"p_grad_y": rows, "p_grad_weights": FP32}
    for product, function, arguments in (
        ("copies of rows", "copy_rows_kernel", common | {"p_x": rows, "p_out": rows}),
        ("sums of rows", "sum_rows_kernel", sums | {"p_weights": None}),
        ("weighted sums of rows", "sum_rows_kernel", sums | {"p_weights": FP32}),
        ("drows, dweights", "combine_bwd_kernel", backward),
    ):
        yield Asked(
            product,
            f"top {K} of {D} columns",
            dtype,
            request("combine/triton_kernel.py", function, arguments, capability),
            max_registers=64,
            instructions=("LDG.E.128", "STG.E.128") if D % 16 == 0 else (),
        )
