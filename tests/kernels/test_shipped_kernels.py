"""The expert path compiled for H100 and B200 at production sizes: nothing spills, tensor cores are used."""

from __future__ import annotations

from compile_gate import assert_fits
from shipped_kernels import TENSOR_CORE, compile_all


def test_fits_both_architectures():
    for shape, request, compiled in compile_all():
        assert_fits(compiled)
        assert compiled.count("ATOM") == compiled.count("ATOMG") == compiled.count("RED") == 0, compiled.name
        multiplies = "BLOCK_K" in request.constexprs
        # fp32 is exact, without tensor cores. Tiles of few rows go to the older instruction.
        if multiplies and "*bf16:16" in request.signature.values():
            assert_uses_tensor_cores(shape.name, request, compiled)


def assert_uses_tensor_cores(name, request, compiled):
    instruction = TENSOR_CORE[request.capability] if request.constexprs["BLOCK_M"] >= 64 else "HMMA"
    assert compiled.count(instruction), f"{name}: {compiled.name} has no {instruction}"
