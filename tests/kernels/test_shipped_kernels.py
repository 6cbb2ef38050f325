"""The expert path compiled for H100 and B200 at production sizes: nothing spills, tensor cores are used."""

from __future__ import annotations

from compile_gate import assert_fits
from shipped_kernels import TENSOR_CORE, Shipped, compile_all


def test_fits_both_architectures():
    for shipped in compile_all():
        compiled = shipped.compiled
        assert_fits(compiled)
        assert compiled.count("ATOM") == compiled.count("ATOMG") == compiled.count("RED") == 0, compiled.name
        multiplies = "BLOCK_K" in shipped.asked.constexprs
        # fp32 is exact, without tensor cores.
        if multiplies and "*bf16:16" in shipped.asked.signature.values():
            assert_uses_tensor_cores(shipped)


def assert_uses_tensor_cores(shipped: Shipped) -> None:
    # Tiles of few rows go to the older instruction.
    low = shipped.asked.constexprs["BLOCK_M"] < 64
    instruction = "HMMA" if low else TENSOR_CORE[shipped.asked.capability]
    assert shipped.compiled.count(instruction), f"{shipped.compiled.name} has no {instruction}"
