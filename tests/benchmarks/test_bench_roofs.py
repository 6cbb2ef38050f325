"""Shapes, their FLOPs, and the roofs of a layer: figures worked out by hand for known shapes."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.roofs import PEAKS, peak_of, roof_ms
from benchmarks.shapes import CUDA_SETS, SETS, Shape, parse_shape, shapes_of

QWEN3_30B = Shape(32768, 2048, 768, 128, 8)


def tflops(shape: Shape, direction: str, ms: float) -> float:
    return shape.flops(direction) / ms / 1e9


def router_ms(shape: Shape, gpu: str) -> float:
    """Its product, or the tokens read and the bf16 logits written."""
    peak, elements = peak_of(gpu), shape.T * (shape.H + shape.E)
    flops = 2 * shape.T * shape.H * shape.E
    return 1e3 * max(flops / peak.flops_per_s, 2 * elements / peak.bytes_per_s)


@pytest.mark.parametrize(
    ("gpu", "shape", "forward", "backward"),
    [
        # TFLOP/s of the project's table of limits, whose forward has the router in it, too.
        ("NVIDIA H100 80GB HBM3", QWEN3_30B, 851, 923),
        ("NVIDIA H200", QWEN3_30B, 888, 942),
        ("NVIDIA B200", QWEN3_30B, 1949, 2105),
        ("NVIDIA H100 80GB HBM3", Shape(40960, 768, 256, 128, 8), 577, 687),
        ("NVIDIA H100 80GB HBM3", Shape(32768, 4096, 1024, 64, 4), 864, 933),
        ("NVIDIA H100 80GB HBM3", Shape(32768, 7168, 2048, 256, 8), 933, 963),
    ],
)
def test_roofs_are_those_of_the_table(gpu, shape, forward, backward):
    with_router_ms = roof_ms(shape, "forward", peak_of(gpu)) + router_ms(shape, gpu)
    assert tflops(shape, "forward", with_router_ms) == pytest.approx(forward, rel=5e-3)
    assert tflops(shape, "backward", roof_ms(shape, "backward", peak_of(gpu))) == pytest.approx(
        backward, rel=1e-3
    )


def test_both_directions_take_the_sum_of_their_times():
    both, *each = (roof_ms(QWEN3_30B, way, PEAKS[0]) for way in ("forward+backward", "forward", "backward"))
    assert both == pytest.approx(sum(each))
    assert QWEN3_30B.flops("forward+backward") == 18 * 32768 * 8 * 2048 * 768


def test_other_gpus_have_no_roof():
    assert peak_of("NVIDIA H100 PCIe") is None  # slower than the SXM board whose data sheet is known
    assert peak_of("AMD EPYC") is None
    assert all(peak.source for peak in PEAKS)


def test_a_shape_is_written_as_it_is_read():
    assert parse_shape("4096,512,256,64,4") == Shape(4096, 512, 256, 64, 4)
    assert str(parse_shape(" 4096, 512,256,64,4")) == "4096,512,256,64,4"


@pytest.mark.parametrize("text", ["", "1,2,3,4", "1,2,3,4,5,6", "a,2,3,4,5", "1,2,3,4,0", "4,4,4,2,3"])
def test_what_is_no_shape_is_refused_with_the_text(text):
    with pytest.raises(argparse.ArgumentTypeError, match="|".join([repr(text), "K=3 of E=2"])):
        parse_shape(text)


def test_named_sets():
    assert shapes_of("cpu", None, None) == [Shape(4096, 512, 256, 64, 4), Shape(2048, 1024, 512, 32, 4)]
    assert shapes_of("cuda", None, None)[0] == QWEN3_30B
    assert len(SETS["sonic12"]) == len(set(SETS["sonic12"])) == 12
    assert set(CUDA_SETS) == set(SETS) - {"cpu"}
    assert shapes_of("cpu", [QWEN3_30B], ["olmoe"]) == [QWEN3_30B, *SETS["olmoe"]]
