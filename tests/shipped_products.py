"""The grouped products of the experts in bf16 and fp32, as training launches them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from shipped_request import (
    BF16,
    CAPABILITIES,
    FP32,
    INDEX,
    INT32,
    INT64,
    TENSOR_CORE,
    TYPICAL,
    Asked,
    Shape,
    request,
)

from moe.kernels.expert_mlp.bias_kernel import BLOCK_COLUMNS, BLOCK_ROWS
from moe.kernels.expert_mlp.triton_kernel import GELU_COLUMNS, PAIRS_BLOCK
from moe.kernels.grouped_gemm.tiles import Sizes, heuristic, launch_options
from moe.kernels.grouped_gemm.triton_kernel import MAP_BLOCK

FEW_TOKENS = Shape("Qwen3-30B-A3B, 1024 tokens", 1024, 2048, 768, 128, 8)
GELU = replace(TYPICAL, name="Qwen3-30B-A3B, GELU in place of SiLU")
ODD = Shape("odd", 4096, 2047, 769, 16, 2)
GPT_OSS = Shape("gpt-oss-20b", 32768, 2880, 2880, 32, 4)
# The kernel of each kind of tile, and its file.
KINDS = {
    "up": ("expert_mlp/triton_kernel.py", "up_kernel"),
    "grad_h": ("expert_mlp/triton_kernel.py", "grad_h_kernel"),
    "gemm": ("grouped_gemm/triton_kernel.py", "grouped_gemm_kernel"),
    "wgrad": ("grouped_gemm/triton_kernel.py", "grouped_wgrad_kernel"),
}
# Kind, columns, length of the sum, and the arguments that are not those of every kernel of the kind.
Product = tuple[str, int, int, dict[str, object]]


def asked() -> Iterator[Asked]:
    """Both architectures where the code differs; the other tiles on one."""
    for capability in CAPABILITIES:
        for shape in (TYPICAL, ODD):
            yield from products_of(shape, "bf16", capability)
        yield from of_indices(TYPICAL, capability)
        yield from of_biased_experts(GPT_OSS, capability)
    yield from products_of(FEW_TOKENS, "bf16", 100)
    yield from products_of(TYPICAL, "fp32", 90)
    yield product("H = X W1, A", up(GELU, BF16, activation="geglu"), GELU, "bf16", 90)
    yield product("dH, A', dS", grad_h(GELU, BF16, activation="geglu"), GELU, "bf16", 90)


def products_of(shape: Shape, dtype: str, capability: int) -> Iterator[Asked]:
    """The six products of the expert path, and the accumulation into the master gradients."""
    D, F, x = shape.D, shape.F, f"*{dtype}:16"
    down = wgrad(D, F, x, right_is_gathered=False)
    gate_up = wgrad(2 * F, D, x, right_is_gathered=True)
    for name, spec in {
        "H = X W1, A": up(shape, x),
        "Y = A W2": gemm(D, F, x, W_IS_NK=True),
        "dH, A', dS": grad_h(shape, x),
        "dX = dH W1": gemm(D, 2 * F, x, W_IS_NK=False),
        "dW2": down,
        "dW2 += in fp32": accumulated(down),
        "dW1": gate_up,
        "dW1 += in fp32": accumulated(gate_up),
    }.items():
        yield product(name, spec, shape, dtype, capability)


def product(name: str, spec: Product, shape: Shape, dtype: str, capability: int) -> Asked:
    """One product with the tile of the heuristic."""
    kind, n, k, arguments = spec
    element_bytes = 4 if dtype == "fp32" else 2
    tile = heuristic(kind, Sizes(shape.T * shape.K, shape.E, n, k), element_bytes, capability // 10)
    if kind == "up" and arguments["ACTIVATION"] == "geglu":
        tile = replace(tile, block_n=min(tile.block_n, GELU_COLUMNS))
    found = request(*KINDS[kind], {"TOP_K": shape.K, **arguments, **launch_options(tile)}, capability)
    # fp32 is exact, without tensor cores; tiles of few rows go to the older instruction.
    core = "HMMA" if tile.block_m < 64 else TENSOR_CORE["bf16", capability]
    blocks = (tile.block_m, tile.block_n, tile.block_k)
    instructions = () if dtype == "fp32" else (core,)
    # What the heuristic counts on: two tiles of dH share a processor, of 65536 registers.
    shares = kind == "grad_h" and tile.num_warps == 8 and arguments["ACTIVATION"] == "swiglu"
    most = 128 if shares else 255
    return Asked(name, shape.name, dtype, found, tile=blocks, max_registers=most, instructions=instructions)


def up(shape: Shape, x: str, *, activation: str = "swiglu", bias: str | None = None) -> Product:
    arguments = {"p_x": x, "p_w": x, "p_bias": bias, "p_h": x, "p_a": x, **INDEX}
    sizes = {"D": shape.D, "F": shape.F, "ACTIVATION": activation}
    return "up", 2 * shape.F, shape.D, arguments | sizes


def grad_h(shape: Shape, x: str, *, activation: str = "swiglu", more_parts: int = 0) -> Product:
    arguments = {"p_grad": x, "p_w": x, "p_h": x, "p_weights": FP32, "p_grad_h": x, "p_scaled_a": x}
    sizes = {"D": shape.D, "F": shape.F, "PARTS": -(-shape.F // 128) + more_parts, "ACTIVATION": activation}
    return "grad_h", shape.F, shape.D, arguments | sizes | INDEX | {"p_partials": FP32}


def gemm(N: int, K: int, x: str, *, W_IS_NK: bool, bias: str | None = None) -> Product:
    arguments = {"p_a": x, "p_w": x, "p_bias": bias, "p_out": x, **INDEX, "p_order": None}
    return "gemm", N, K, arguments | {"N": N, "K": K, "W_IS_NK": W_IS_NK}


def wgrad(M: int, N: int, x: str, *, right_is_gathered: bool) -> Product:
    orders = (None, INT64) if right_is_gathered else (INT64, None)
    arguments = {"p_left": x, "p_right": x, "p_out": x, "p_ends": INT32, "ACCUMULATE": False}
    arguments |= dict(zip(("p_order_left", "p_order_right"), orders, strict=True))
    return "wgrad", N, M, arguments | {"M": M, "N": N}


def accumulated(product: Product) -> Product:
    """A weight's gradient, added to one in fp32."""
    kind, columns, length, arguments = product
    return kind, columns, length, arguments | {"p_out": FP32, "ACCUMULATE": True}


def of_indices(shape: Shape, capability: int) -> Iterator[Asked]:
    """The map of tiles, and the sum of the parts of a weight's gradient."""
    tile_map = {"p_ends": INT32, "p_map": INT32, "num_tiles": "i32", "num_experts": "i32"}
    blocks = {"BLOCK_M": 128, "E_PAD": 1 << (shape.E - 1).bit_length(), "BLOCK_P": MAP_BLOCK}
    found = request("grouped_gemm/triton_kernel.py", "tile_map_kernel", tile_map | blocks, capability)
    yield Asked("tiles", shape.name, "int32", found)
    pointers = {"p_partials": FP32, "p_inverse": INT64, "p_ends": INT32, "p_out": FP32}
    sizes = {"num_pairs": "i32", "num_experts": "i32", "PARTS": -(-shape.F // 128), "BLOCK": PAIRS_BLOCK}
    found = request("expert_mlp/triton_kernel.py", "sum_partials_kernel", pointers | sizes, capability)
    yield Asked("dS", shape.name, "fp32", found)


def of_biased_experts(shape: Shape, capability: int) -> Iterator[Asked]:
    """What differs where experts have biases and a clamped activation."""
    file, clamped = "expert_mlp/bias_kernel.py", "clamped_swiglu"
    for name, spec in {
        "H = X W1 + b1, A": up(shape, BF16, activation=clamped, bias=BF16),
        "Y = A W2 + b2": gemm(shape.D, shape.F, BF16, W_IS_NK=True, bias=BF16),
        "dH, A', dS, clamped": grad_h(shape, BF16, activation=clamped, more_parts=1),
    }.items():
        yield product(name, spec, shape, "bf16", capability)
    blocks = {"BLOCK_R": BLOCK_ROWS, "BLOCK_N": BLOCK_COLUMNS, "TOP_K": shape.K}
    sums = {"p_a": BF16, "p_ends": INT32, "p_out": BF16, **blocks}
    gathers = {"p_order": INT64, "p_weights": FP32, "N": shape.D}
    as_they_come = {"p_order": None, "p_weights": None, "N": 2 * shape.F}
    dot = {"p_grad": BF16, "p_bias": BF16, "p_out": FP32, **INDEX, **blocks, "D": shape.D, "STRIDE": 24}
    for name, function, arguments in (
        ("db1", "expert_sums_kernel", sums | as_they_come),
        ("db2", "expert_sums_kernel", sums | gathers),
        ("dS of b2", "bias_products_kernel", dot),
    ):
        yield Asked(name, shape.name, "bf16", request(file, function, arguments, capability))
