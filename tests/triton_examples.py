"""Small kernels with known properties, on which the tests of the interpreter and of the gate run."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_bf16_and_back(p_x, p_narrow, p_wide, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_narrow = tl.load(p_x + o).to(tl.bfloat16)
    tl.store(p_narrow + o, b_narrow)
    tl.store(p_wide + o, b_narrow.to(tl.float32))


@triton.jit
def dot(p_a, p_b, p_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(p_out + o, tl.dot(tl.load(p_a + o), tl.load(p_b + o)))


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
