"""How fast a GPU could compute a layer of experts: each kernel bound by its products or its bytes.

python -m benchmarks.roofs --json out.json     measures what the GPU at hand reaches of its data sheet
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness import require_device, stamp, time_interleaved_ms, whole, write_json
from benchmarks.shapes import Shape

BF16_BYTES = 2


@dataclass(frozen=True)
class Peak:
    """Data sheet of a GPU.

    Attributes:
        name: part of what CUDA calls it.
        flops_per_s: bf16 products with fp32 sums, dense.
        bytes_per_s: of its memory.
        source: where both numbers stand.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    source: str


PEAKS = (
    Peak("H100 80GB HBM3", 989e12, 3.35e12, "NVIDIA H100 data sheet, SXM"),
    Peak("H200", 989e12, 4.8e12, "NVIDIA H200 data sheet, SXM"),
    Peak("B200", 2250e12, 8.0e12, "NVIDIA HGX B200 data sheet"),
)


def peak_of(device_name: str) -> Peak | None:
    """The data sheet of a GPU by its CUDA name; None for one that is not in PEAKS, and for a CPU."""
    return next((peak for peak in PEAKS if peak.name in device_name), None)


def roof_ms(shape: Shape, direction: str, peak: Peak) -> float:
    """Least milliseconds of a bf16 layer that runs SonicMoE's kernels (arXiv 2512.14080) without overlap.

    Rows that are gathered come from memory once: the L2 cache serves them again. The router is not counted.
    """
    kernels = {
        "forward": _forward_kernels(shape),
        "backward": _backward_kernels(shape),
        "forward+backward": _forward_kernels(shape) + _backward_kernels(shape),
    }[direction]
    return 1e3 * sum(
        max(flops / peak.flops_per_s, elements * BF16_BYTES / peak.bytes_per_s) for flops, elements in kernels
    )


def _forward_kernels(shape: Shape) -> list[tuple[int, int]]:
    """FLOPs, and elements read and written, of up, down and combine."""
    T, H, I, E, N = shape.T, shape.H, shape.I, shape.E, shape.pairs
    return [
        (4 * N * H * I, T * H + 2 * E * H * I + 2 * N * I + N * I),
        (2 * N * H * I, N * I + E * H * I + N * H),
        (0, N * H + T * H),
    ]


def _backward_kernels(shape: Shape) -> list[tuple[int, int]]:
    """Likewise, of dH, dW2, dX of the rows, dW1, and their sum over a token's experts."""
    T, H, I, E, N = shape.T, shape.H, shape.I, shape.E, shape.pairs
    return [
        (2 * N * H * I, T * H + E * H * I + 2 * N * I + 2 * N * I + N * I),
        (2 * N * H * I, T * H + N * I + E * H * I),
        (4 * N * H * I, 2 * N * I + 2 * E * H * I + N * H),
        (4 * N * H * I, T * H + 2 * N * I + 2 * E * H * I),
        (0, N * H + T * H),
    ]


def main() -> None:
    """Measure a large product and a large copy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    require_device("cuda")
    result = measured_peaks()
    print(result)
    if args.json:
        write_json(args.json, result)


def measured_peaks(size: int = 8192) -> dict[str, object]:
    """FLOP/s of a bf16 product of random square matrices, bytes/s (read and written) of a copy of 4 GiB."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    samples = time_interleaved_ms(
        {
            "product": whole(lambda: left @ right),
            "copy": whole(lambda: target.copy_(source)),
        },
        budget_s=2.0,
        device="cuda",
    )
    product_ms, copy_ms = (statistics.median(ms for (ms,) in samples[name]) for name in ("product", "copy"))
    return {
        "product_tflops": 2 * size**3 / product_ms / 1e9,
        "copy_tbytes_per_s": 2 * source.numel() * source.element_size() / copy_ms / 1e9,
        "stamp": stamp("cuda"),
    }


if __name__ == "__main__":
    main()
