"""Every kernel of the expert path as training launches it on H100 and B200, for the compile gate.

    python tests/shipped_kernels.py --json benchmarks/results/compiled-kernels.json

writes what the compiler made of them: registers, spilled bytes, shared memory, tensor-core instructions. No
GPU is needed, and how fast a kernel is, only a GPU says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from compile_gate import Compiled, Request, compile_in_subprocess

from moe.kernels.expert_mlp.triton_kernel import PAIRS_BLOCK
from moe.kernels.grouped_gemm.tiles import Sizes, heuristic, launch_options
from moe.kernels.grouped_gemm.triton_kernel import MAP_BLOCK

KERNELS = Path(__file__).parents[1] / "kernels"
CAPABILITIES = (90, 100)
# The instruction that a tensor core gets: one word a warp group on Hopper, one a block on Blackwell.
TENSOR_CORE = {90: "HGMMA", 100: "UTCHMMA"}
BYTES = {"bf16": 2, "fp32": 4}
INDEX = {"p_order": "*i64:16", "p_ends": "*i32:16", "p_map": "*i32:16"}


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
FEW_TOKENS = Shape("Qwen3-30B-A3B, 1024 tokens", 1024, 2048, 768, 128, 8)
ODD = Shape("odd", 4096, 2047, 769, 16, 2)
# The kernel of each kind of tile, and its folder.
KINDS = {
    "up": ("expert_mlp", "up_kernel"),
    "grad_h": ("expert_mlp", "grad_h_kernel"),
    "gemm": ("grouped_gemm", "grouped_gemm_kernel"),
    "wgrad": ("grouped_gemm", "grouped_wgrad_kernel"),
}
Arguments = dict[str, object]


def matmul_requests(shape: Shape, dtype: str, capability: int) -> Iterator[tuple[str, Request]]:
    """The six products of the expert path by name, and the accumulation into a master gradient."""
    D, F, x = shape.D, shape.F, f"*{dtype}:16"
    up = {"p_x": x, "p_w": x, "p_bias": None, "p_h": x, "p_a": x, **INDEX}
    grad_h = {"p_grad": x, "p_w": x, "p_h": x, "p_weights": "*fp32:16", "p_grad_h": x, "p_scaled_a": x}
    gemm = {
        "p_a": x,
        "p_w": x,
        "p_bias": None,
        "p_out": x,
        "p_ends": "*i32:16",
        "p_map": "*i32:16",
        "p_order": None,
    }
    wgrad = {"p_left": x, "p_right": x, "p_out": x, "p_ends": "*i32:16", "ACCUMULATE": False}
    down = {"p_order_left": "*i64:16", "p_order_right": None, "M": D, "N": F}
    gate_up = {"p_order_left": None, "p_order_right": "*i64:16", "M": 2 * F, "N": D}
    sizes = {"D": D, "F": F, "ACTIVATION": "swiglu"}
    accumulated = {"p_out": "*fp32:16", "ACCUMULATE": True}
    for name, kind, n, k, arguments in (
        ("H = X W1, A", "up", 2 * F, D, up | sizes),
        ("Y = A W2", "gemm", D, F, gemm | {"N": D, "K": F, "W_IS_NK": True}),
        (
            "dH, A', dS",
            "grad_h",
            F,
            D,
            grad_h | {"p_partials": "*fp32:16", "PARTS": -(-F // 128)} | sizes | INDEX,
        ),
        ("dX = dH W1", "gemm", D, 2 * F, gemm | {"N": D, "K": 2 * F, "W_IS_NK": False}),
        ("dW2", "wgrad", F, D, wgrad | down),
        ("dW1", "wgrad", D, 2 * F, wgrad | gate_up),
        ("dW1 += in fp32", "wgrad", D, 2 * F, wgrad | gate_up | accumulated),
    ):
        tile = heuristic(kind, Sizes(shape.T * shape.K, shape.E, n, k), BYTES[dtype], capability // 10)
        yield name, request(*KINDS[kind], {"TOP_K": shape.K, **arguments, **launch_options(tile)}, capability)


def index_requests(shape: Shape, capability: int) -> Iterator[tuple[str, Request]]:
    """The map of tiles, and the sum of the parts of a weight's gradient."""
    tile_map = {"p_ends": "*i32:16", "p_map": "*i32:16", "num_tiles": "i32", "num_experts": "i32"}
    blocks = {"BLOCK_M": 128, "E_PAD": 1 << (shape.E - 1).bit_length(), "BLOCK_P": MAP_BLOCK}
    yield "tiles", request("grouped_gemm", "tile_map_kernel", tile_map | blocks, capability)
    pointers = {"p_partials": "*fp32:16", "p_inverse": "*i64:16", "p_ends": "*i32:16", "p_out": "*fp32:16"}
    sizes = {"num_pairs": "i32", "num_experts": "i32", "PARTS": -(-shape.F // 128), "BLOCK": PAIRS_BLOCK}
    yield "dS", request("expert_mlp", "sum_partials_kernel", pointers | sizes, capability)


def request(folder: str, function: str, arguments: Arguments, capability: int) -> Request:
    """Arguments in lower case that have a type are the signature, the others are constants and options."""
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
    typed = {n: v for n, v in arguments.items() if n.islower() and v is not None}
    constants = {n: v for n, v in arguments.items() if n not in typed}
    return Request(
        KERNELS / folder / "triton_kernel.py", function, typed, constants, capability=capability, **options
    )


@dataclass(frozen=True)
class Shipped:
    """A kernel as training launches it, and what the compiler made of it."""

    shape: Shape
    product: str
    asked: Request
    compiled: Compiled

    def row(self) -> dict[str, object]:
        """A line of the result file."""
        return {
            "product": self.product,
            "kernel": self.asked.function,
            "shape": self.shape.name,
            "dtype": "bf16" if "*bf16:16" in self.asked.signature.values() else "fp32",
            "capability": self.asked.capability,
            "tile": [self.asked.constexprs.get(f"BLOCK_{name}") for name in "MNK"],
            "num_warps": self.asked.num_warps,
            "num_stages": self.asked.num_stages,
            "registers": self.compiled.registers,
            "spill_bytes": self.compiled.spill_bytes,
            "shared_bytes": self.compiled.shared_bytes,
            "tensor_core_instructions": self.compiled.count(TENSOR_CORE[self.asked.capability]),
        }


def requests() -> Iterator[tuple[Shape, tuple[str, Request]]]:
    """Both architectures where the code differs; the other tiles on one."""
    for capability in CAPABILITIES:
        for shape in (TYPICAL, ODD):
            for named in matmul_requests(shape, "bf16", capability):
                yield shape, named
        for named in index_requests(TYPICAL, capability):
            yield TYPICAL, named
    for named in matmul_requests(FEW_TOKENS, "bf16", 100):
        yield FEW_TOKENS, named
    for named in matmul_requests(TYPICAL, "fp32", 90):
        yield TYPICAL, named


def compile_all() -> list[Shipped]:
    """Compile all requests."""
    asked = list(requests())
    compiled = compile_in_subprocess([request for _, (_, request) in asked])
    return [
        Shipped(shape, product, request, result)
        for (shape, (product, request)), result in zip(asked, compiled, strict=True)
    ]


def main() -> None:
    """Write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    path = parser.parse_args().json
    rows = [shipped.row() for shipped in compile_all() if "BLOCK_K" in shipped.asked.constexprs]
    result = {"triton": triton.__version__, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
