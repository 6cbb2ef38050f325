"""Every kernel of the library as training launches it on H100 and B200, for the compile gate.

    python tests/shipped_kernels.py --json benchmarks/results/compiled-kernels.json

writes what the compiler made of them: registers, spilled bytes, shared memory, tensor-core instructions. No
GPU is needed, and how fast a kernel is, only a GPU says.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import shipped_low_precision
import shipped_products
import shipped_routing
import triton
from compile_gate import Compiled, compile_in_subprocess
from shipped_request import TENSOR_CORE, Asked

FAMILIES = (shipped_products, shipped_low_precision, shipped_routing)
PROCESSES = 2  # that compile at once


@dataclass(frozen=True)
class Shipped:
    """A kernel as training launches it, and what the compiler made of it."""

    asked: Asked
    compiled: Compiled

    def row(self) -> dict[str, object]:
        """A line of the result file."""
        asked = self.asked
        core = TENSOR_CORE.get((asked.dtype, asked.request.capability))
        return {
            "product": asked.product,
            "kernel": asked.request.function,
            "shape": asked.shape,
            "dtype": asked.dtype,
            "capability": asked.request.capability,
            "tile": asked.tile,
            "num_warps": asked.request.num_warps,
            "num_stages": asked.request.num_stages,
            "registers": self.compiled.registers,
            "spill_bytes": self.compiled.spill_bytes,
            "shared_bytes": self.compiled.shared_bytes,
            "tensor_core_instructions": self.compiled.count(core) if core else 0,
        }


def everything() -> list[Asked]:
    """What the gate compiles."""
    return list(chain.from_iterable(family.asked() for family in FAMILIES))


def compile_all() -> list[Shipped]:
    """Compile everything, in the order of `everything`."""
    asked = everything()
    turns = [asked[turn::PROCESSES] for turn in range(PROCESSES)]
    with ThreadPoolExecutor(PROCESSES) as pool:
        done = pool.map(compile_in_subprocess, ([each.request for each in turn] for turn in turns))
        compiled: list[Compiled | None] = [None] * len(asked)
        for turn, results in enumerate(done):
            compiled[turn::PROCESSES] = results
    return [Shipped(*pair) for pair in zip(asked, compiled, strict=True)]


def main() -> None:
    """Write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    path = parser.parse_args().json
    result = {"triton": triton.__version__, "rows": [shipped.row() for shipped in compile_all()]}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
