"""The shapes that benchmarks measure: those that others publish, and two for a CPU."""

from __future__ import annotations

import argparse
from dataclasses import astuple, dataclass

DIRECTIONS = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Shape:
    """Of a layer of experts: T tokens, H model width, I expert hidden, E experts, K of them a token."""

    T: int
    H: int
    I: int
    E: int
    K: int

    def __str__(self) -> str:
        return ",".join(map(str, astuple(self)))

    @property
    def pairs(self) -> int:
        """N, how many rows the experts compute."""
        return self.T * self.K

    def flops(self, direction: str) -> int:
        """6 N H I forward (three matrices), twice that backward; the router is not counted."""
        per_product = {"forward": 6, "backward": 12, "forward+backward": 18}
        return per_product[direction] * self.pairs * self.H * self.I


SETS: dict[str, tuple[Shape, ...]] = {
    "cpu": (Shape(4096, 512, 256, 64, 4), Shape(2048, 1024, 512, 32, 4)),
    "qwen3-30b": (Shape(32768, 2048, 768, 128, 8),),
    "qwen3-next": (Shape(32768, 2048, 512, 512, 10),),
    "olmoe": (Shape(32768, 2048, 1024, 64, 8),),
    "deepseek-v3": (Shape(32768, 7168, 2048, 256, 8),),
    # The twelve of SonicMoE's figures (arXiv 2512.14080).
    "sonic12": (
        Shape(40960, 768, 256, 128, 8),
        Shape(40960, 768, 512, 64, 4),
        Shape(40960, 768, 1024, 32, 2),
        Shape(24576, 1536, 256, 128, 8),
        Shape(24576, 1536, 512, 64, 4),
        Shape(24576, 1536, 1024, 32, 2),
        Shape(32768, 4096, 256, 256, 16),
        Shape(32768, 4096, 512, 128, 8),
        Shape(32768, 4096, 1024, 64, 4),
        Shape(32768, 4096, 512, 256, 16),
        Shape(32768, 4096, 1024, 128, 8),
        Shape(32768, 4096, 2048, 64, 4),
    ),
}
# On a GPU without --shape: headline shapes first, those that may not fit its memory last.
CUDA_SETS = ("qwen3-30b", "olmoe", "qwen3-next", "sonic12", "deepseek-v3")


def parse_shape(text: str) -> Shape:
    """`T,H,I,E,K`, or argparse's error that shows how to write one."""
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 5 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not five positive integers T,H,I,E,K, for example 4096,512,256,64,4"
        )
    shape = Shape(*sizes)
    if shape.K > shape.E:
        raise argparse.ArgumentTypeError(f"{text!r}: a token cannot have K={shape.K} of E={shape.E} experts")
    return shape


def shapes_of(device: str, shapes: list[Shape] | None, sets: list[str] | None) -> list[Shape]:
    """What was asked for, in that order; the device's own list if nothing was."""
    if shapes or sets:
        return [*(shapes or []), *(shape for name in sets or [] for shape in SETS[name])]
    return [shape for name in (CUDA_SETS if device == "cuda" else ("cpu",)) for shape in SETS[name]]
