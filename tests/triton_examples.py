"""Small kernels with known properties, on which the tests of the interpreter and of the gate run."""

from __future__ import annotations

import triton
import triton.language as tl

E4M3 = tl.constexpr("e4m3")


@triton.jit
def narrow_and_widen(p_x, p_narrow, p_wide, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_narrow = tl.load(p_x + o).to(p_narrow.dtype.element_ty)
    tl.store(p_narrow + o, b_narrow)
    tl.store(p_wide + o, b_narrow.to(tl.float32))


@triton.jit
def dot(p_a, p_b, p_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(p_out + o, tl.dot(tl.load(p_a + o), tl.load(p_b + o)))


@triton.jit
def dot_scaled(p_a, p_a_scales, p_b, p_b_scales, p_out, BLOCK: tl.constexpr):  # noqa: PLR0917
    """Operands of e4m3, a scale of e8m0 for every 32 numbers of a row of a and of a column of b."""
    o = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    o_scales = tl.arange(0, BLOCK)[:, None] * (BLOCK // 32) + tl.arange(0, BLOCK // 32)[None, :]
    b_a_scales, b_b_scales = tl.load(p_a_scales + o_scales), tl.load(p_b_scales + o_scales)
    b_out = tl.dot_scaled(tl.load(p_a + o), b_a_scales, E4M3, tl.load(p_b + o), b_b_scales, E4M3)
    tl.store(p_out + o, b_out)


@triton.jit
def double(p_x, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_x + o, tl.load(p_x + o) + tl.load(p_x + o))


@triton.jit
def total(p_x, BLOCK: tl.constexpr):
    tl.store(p_x, tl.sum(tl.load(p_x + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def sort_rows(p_x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(p_x + o, tl.sort(tl.load(p_x + o)))


@triton.jit
def spill(p_x, BLOCK: tl.constexpr):
    """Holds BLOCK^2 numbers in registers across a sum of all of them."""
    o = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    b_x = tl.load(p_x + o)
    tl.store(p_x + o, b_x / tl.sum(tl.sum(b_x, axis=1), axis=0))
