"""How the compile gate is asked for a kernel as training launches it, and what it must find in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compile_gate import Request

KERNELS = Path(__file__).parents[1] / "kernels"
CAPABILITIES = (90, 100)
# What a tensor core is told for a product of these operands: by each warp group on Hopper, by one thread of a
# block on Blackwell.
TENSOR_CORE = {
    ("bf16", 90): "HGMMA",
    ("bf16", 100): "UTCHMMA",
    ("fp8", 90): "QGMMA",
    ("fp8", 100): "UTCQMMA",
    ("mxfp8", 100): "UTCQMMA",
}
# Types of arguments. Every torch allocation begins at a multiple of 16 bytes.
FP32, BF16, FP8, BYTES = "*fp32:16", "*bf16:16", "*fp8e4nv:16", "*u8:16"
INT32, INT64 = "*i32:16", "*i64:16"
SCALARS = ("i32", "fp32")
INDEX = {"p_order": INT64, "p_ends": INT32, "p_map": INT32}


@dataclass(frozen=True)
class Shape:
    """T tokens, D model, F expert hidden, E experts, K top-k."""

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int


# Sizes only change constants; what changes the code is how high a tile is, and whether rows are aligned.
TYPICAL = Shape("Qwen3-30B-A3B", 32768, 2048, 768, 128, 8)


@dataclass(frozen=True)
class Asked:
    """A kernel in one configuration.

    Attributes:
        product: what it computes.
        shape: name of the sizes.
        dtype: of its operands; that of scores and of rows for a kernel without products.
        request: to the compile gate.
        tile: rows, columns and step of the sum of a product; else empty.
        max_registers: more than these would leave too few threads to hide latency behind.
        instructions: that it must have.
        counts_atomically: integers are added in memory, in any order with the same sum.
    """

    product: str
    shape: str
    dtype: str
    request: Request
    tile: tuple[int, ...] = ()
    max_registers: int = 255
    instructions: tuple[str, ...] = ()
    counts_atomically: bool = False


def request(file: str, function: str, arguments: Mapping[str, object], capability: int) -> Request:
    """Arguments with a type are the signature, the others are constants and options."""
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    typed = {name: kind for name, kind in arguments.items() if str(kind).startswith("*") or kind in SCALARS}
    constants = {name: value for name, value in arguments.items() if name not in typed | options}
    return Request(KERNELS / file, function, typed, constants, capability=capability, **options)
