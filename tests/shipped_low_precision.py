"""Quantisation and the experts in low precision, as training launches them.

FP8 with scales of its own runs on sm_90 and sm_100; the tensor cores of sm_90 know no scales of MXFP8, so its
products exist for sm_100 only, and what quantises for them too.
"""

from __future__ import annotations

from collections.abc import Iterator

from compile_gate import Request
from shipped_request import (
    BF16,
    BYTES,
    FP8,
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

from moe.kernels.expert_mlp import fp8_kernel as fp8_experts
from moe.kernels.expert_mlp import mx_kernel as mx_experts
from moe.kernels.grouped_gemm import mx_kernel as mx_products
from moe.kernels.grouped_gemm.fp8_kernel import gemm_tile, wgrad_tile
from moe.kernels.quantize import triton_kernel as quantizers
from moe.kernels.quantize.formats import FORMATS, ROW_TILE

DEEPSEEK = Shape("DeepSeek-V3", 16384, 7168, 2048, 256, 8)
FEW_TOKENS = Shape("DeepSeek-V3, 1024 tokens", 1024, 7168, 2048, 256, 8)
SMALL = Shape("64 columns", 4096, 64, 128, 8, 2)
WIDE_STEP = 64  # of a sum of wide operands
# A number is loaded and stored with its neighbours, and F2FP converts two at once: no slow path for FP8.
IN_ONE_GO = ("LDG.E.128", "STG.E.128", "F2FP")


def asked() -> Iterator[Asked]:
    """Each format where it runs, H as it is and compressed, and with wide products into the activation."""
    yield from fp8(TYPICAL, 90, compress_h=False)
    yield from fp8(DEEPSEEK, 90, compress_h=True)
    yield from fp8(TYPICAL, 100, compress_h=False)
    yield from mxfp8(TYPICAL, compress_h=False)
    yield from mxfp8(DEEPSEEK, compress_h=True)
    yield from fp8_activation(DEEPSEEK, 90, wide=True)
    yield from fp8_activation(DEEPSEEK, 100, wide=True)
    yield from mxfp8_activation(DEEPSEEK, wide=True)
    for shape in (FEW_TOKENS, SMALL):  # tiles of other sizes
        yield fp8_gemm("Y = A W2", shape, (shape.D, shape.F), 90)
    yield fp8_wgrad("dW2", SMALL, (64, 64), 90)
    for turn, (format, capability) in enumerate(
        (("fp8", 90), ("fp8_power_of_two", 90), ("fp8", 100), ("mxfp8", 100))
    ):
        shape, dtype = (TYPICAL, DEEPSEEK)[turn % 2], ("bf16", "fp32")[turn % 2]
        yield from quantized(shape, dtype, format, capability)


def with_scales(*names: str, scales: str) -> dict[str, object]:
    """Values in FP8 and their scales."""
    pairs = ((f"p_{name}", f"p_{name.removesuffix('s')}_scales") for name in names)
    return {key: kind for pair in pairs for key, kind in zip(pair, (FP8, scales), strict=True)}


def operands(*names: str, scales: str, wide: bool) -> dict[str, object]:
    """The same, or in bf16 without scales."""
    if not wide:
        return with_scales(*names, scales=scales)
    return {f"p_{name}": BF16 for name in names} | {f"p_{name}_scales": None for name in names}


def saved_h(scales: str, *, compress_h: bool) -> dict[str, object]:
    return {"p_h": FP8, "p_h_scales": scales} if compress_h else {"p_h": BF16, "p_h_scales": None}


def fp8(shape: Shape, capability: int, *, compress_h: bool) -> Iterator[Asked]:
    """Every product, scales of a power of two where H is compressed."""
    D, F = shape.D, shape.F
    yield from fp8_activation(shape, capability, compress_h=compress_h)
    yield fp8_gemm("Y = A W2", shape, (D, F), capability)
    yield fp8_gemm("dX = dH W1", shape, (D, 2 * F), capability, transposed=True)
    yield fp8_wgrad("dW2", shape, (D, F), capability)
    yield fp8_wgrad("dW1", shape, (2 * F, D), capability)


def fp8_activation(
    shape: Shape, capability: int, *, compress_h: bool = False, wide: bool = False
) -> Iterator[Asked]:
    """The two products with the activation."""
    D, F = shape.D, shape.F
    both = saved_h(FP32, compress_h=compress_h) | INDEX | {"TOP_K": shape.K, "D": D, "F": F}
    both |= {"POWER_OF_TWO": compress_h}
    up_tile = fp8_experts.WIDE_UP_TILE if wide else fp8_experts.UP_TILE
    up = operands("x", "w", scales=FP32, wide=wide) | with_scales("a", scales=FP32) | both | up_tile
    up |= {"W_STRIDES": (2 * F * D, D, 1) if wide else squares(2 * F, D)}
    grad_h = operands("grad", "w", scales=FP32, wide=wide) | both | fp8_experts.GRAD_H_TILE
    grad_h |= with_scales("rows", "columns", "a", scales=FP32)
    grad_h |= {"p_weights": FP32, "p_partials": FP32, "num_tiles": "i32"}
    grad_h |= {"W_STRIDES": (D * F, 1, F) if wide else squares(F, D, transposed=True)}
    dtype, step = ("bf16", WIDE_STEP) if wide else ("fp8", ROW_TILE)
    for name, kind, arguments, tile in (
        ("H = X W1, A", "up", up, (up_tile["BLOCK_M"], 2 * ROW_TILE, step)),
        ("dH, A', dS", "grad_h", grad_h, (ROW_TILE, ROW_TILE, step)),
    ):
        found = request("expert_mlp/fp8_kernel.py", f"fp8_{kind}_kernel", arguments, capability)
        yield product(name, shape, dtype, found, tile)


def fp8_gemm(
    name: str, shape: Shape, sizes: tuple[int, int], capability: int, *, transposed: bool = False
) -> Asked:
    (N, K), tile = sizes, gemm_tile(shape.T * shape.K // shape.E, sizes[0])
    arguments = with_scales("a", "w", scales=FP32) | {"p_out": BF16} | INDEX | {"p_order": None}
    arguments |= {"TOP_K": 1, "N": N, "K": K, "W_STRIDES": squares(N, K, transposed=transposed)} | tile
    found = request("grouped_gemm/fp8_kernel.py", "fp8_gemm_kernel", arguments, capability)
    return product(name, shape, "fp8", found, (tile["BLOCK_M"], tile["BLOCK_N"], ROW_TILE))


def squares(N: int, K: int, *, transposed: bool = False) -> tuple[int, int, int]:
    """Strides of the scales of a weight [e, N, K] that `fp8_weight` made."""
    blocks_N, blocks_K = -(-N // ROW_TILE), -(-K // ROW_TILE)
    return blocks_N * blocks_K, *((1, blocks_N) if transposed else (blocks_K, 1))


def fp8_wgrad(name: str, shape: Shape, sizes: tuple[int, int], capability: int) -> Asked:
    (M, N), tile = sizes, wgrad_tile(*sizes)
    arguments = with_scales("left", "right", scales=FP32) | {"p_out": BF16, "p_ends": INT32, "M": M, "N": N}
    arguments |= {"num_tiles": "i32", "E": shape.E, "E_PAD": shape.E} | tile
    found = request("grouped_gemm/fp8_kernel.py", "fp8_wgrad_kernel", arguments, capability)
    return product(name, shape, "fp8", found, (tile["BLOCK_MN"], tile["BLOCK_MN"], ROW_TILE))


def mxfp8(shape: Shape, *, compress_h: bool) -> Iterator[Asked]:
    """Every product, on sm_100."""
    D, F, E = shape.D, shape.F, shape.E
    up, grad_h = mxfp8_activation(shape, compress_h=compress_h)
    gemm = with_scales("a", "w", scales=BYTES) | {"p_out": BF16, "TOP_K": 1} | INDEX | {"p_order": None}
    gemm |= mx_products.TILE
    wgrad = with_scales("left", "right", scales=BYTES) | {"p_out": BF16, "p_ends": INT32, "num_tiles": "i32"}
    wgrad |= {"E": E, "E_PAD": E} | mx_products.TILE
    down, back = {"K": F, "W_STRIDES": by_rows(D, F)}, {"K": 2 * F, "W_STRIDES": by_columns(2 * F, E)}
    yield up
    yield mx_product("Y = A W2", shape, "gemm", gemm | down | {"N": D})
    yield grad_h
    yield mx_product("dX = dH W1", shape, "gemm", gemm | back | {"N": D})
    yield mx_product("dW2", shape, "wgrad", wgrad | {"M": D, "N": F})
    yield mx_product("dW1", shape, "wgrad", wgrad | {"M": 2 * F, "N": D})


def mx_product(name: str, shape: Shape, kind: str, arguments: dict[str, object]) -> Asked:
    found = request("grouped_gemm/mx_kernel.py", f"mx_{kind}_kernel", arguments, 100)
    tile = (mx_products.TILE["BLOCK_M"], mx_products.TILE["BLOCK_N"], ROW_TILE)
    return product(name, shape, "mxfp8", found, tile)


def mxfp8_activation(shape: Shape, *, compress_h: bool = False, wide: bool = False) -> Iterator[Asked]:
    """The two products with the activation, on sm_100."""
    D, F = shape.D, shape.F
    both = saved_h(BYTES, compress_h=compress_h) | INDEX | {"TOP_K": shape.K, "D": D, "F": F}
    up = operands("x", "w", scales=BYTES, wide=wide) | both | mx_experts.UP_TILE
    up |= with_scales("a", scales=BYTES)
    up |= {"W_STRIDES": (2 * F * D, D, 1) if wide else by_rows(2 * F, D)}
    grad_h = operands("grad", "w", scales=BYTES, wide=wide) | both | mx_experts.GRAD_H_TILE
    grad_h |= with_scales("rows", "columns", "a", scales=BYTES)
    grad_h |= {"p_weights": FP32, "p_partials": FP32, "num_tiles": "i32"}
    grad_h |= {"W_STRIDES": (D * F, 1, F) if wide else by_columns(D, shape.E)}
    dtype, step = ("bf16", WIDE_STEP) if wide else ("mxfp8", ROW_TILE)
    for name, kind, arguments in (("H = X W1, A", "up", up), ("dH, A', dS", "grad_h", grad_h)):
        found = request("expert_mlp/mx_kernel.py", f"mx_{kind}_kernel", arguments, 100)
        blocks = (arguments.get(f"BLOCK_{side}", ROW_TILE) for side in "MN")
        yield product(name, shape, dtype, found, (*blocks, step))


def by_rows(N: int, K: int) -> tuple[int, int, int, int]:
    """Strides of a weight [e, N, K] that `mx_weight` made."""
    return N * K, K, N * K // 32, K // 32


def by_columns(N: int, experts: int) -> tuple[int, int, int, int]:
    """The same of one to sum over N with: a row for each k, with a spare tile for each expert."""
    P = (N // ROW_TILE * experts + experts) * ROW_TILE
    return N, P, N // 32, P // 32


def product(name: str, shape: Shape, dtype: str, found: Request, tile: tuple[int, ...]) -> Asked:
    core = TENSOR_CORE[dtype, found.capability]
    return Asked(name, shape.name, dtype, found, tile=tile, instructions=(core,))


def quantized(shape: Shape, dtype: str, format: str, capability: int) -> Iterator[Asked]:
    """Rows of tokens, weights in both orientations, columns of tokens in expert order."""
    kind, x = FORMATS[format], f"*{dtype}:16"
    outputs = {"p_values": FP8, "p_scales": BYTES if format == "mxfp8" else FP32}
    rows = {"p_x": x, "R": "i32"} | outputs | quantizers.row_constants(shape.D, kind)
    columns = {"p_x": x, "p_order": INT64, "p_ends": INT32} | outputs
    columns |= quantizers.column_constants(shape.D, shape.E, shape.K, kind)
    weights = {"p_w": x, "N": 2 * shape.F, "K": shape.D, "BLOCK": kind.block} | outputs
    weights |= {"POWER_OF_TWO": kind.power_of_two, "num_warps": quantizers.NUM_WARPS_WEIGHTS}
    named = {
        "rows": ("rows", rows | {"num_warps": quantizers.NUM_WARPS}),
        "columns": ("columns", columns | {"num_warps": quantizers.NUM_WARPS_COLUMNS}),
    }
    if format == "mxfp8":
        as_they_come = {"p_order": None, "TOP_K": 1, "num_warps": quantizers.NUM_WARPS_COLUMNS}
        named["columns of a weight"] = ("columns", columns | as_they_come)
    else:
        named["squares"] = ("weights", weights | {"TRANSPOSED": False})
        named["squares, transposed"] = ("weights", weights | {"TRANSPOSED": True})
    for name, (function, arguments) in named.items():
        found = request("quantize/triton_kernel.py", f"quantize_{function}_kernel", arguments, capability)
        yield Asked(
            f"{name} in {format}", shape.name, dtype, found, max_registers=128, instructions=IN_ONE_GO
        )
