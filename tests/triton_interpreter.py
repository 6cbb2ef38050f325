"""Triton's interpreter, put right for our kernels: tests without a GPU run them on the CPU.

Triton 3.7 keeps bf16 as raw 16 bits there: a cast from fp32 cuts bits off where a GPU rounds, and arithmetic
is done on the bits, silently wrong. Here casts round to nearest even and tl.dot takes bf16 operands. Other
arithmetic on bf16 raises: our kernels widen to fp32 first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import ReduceOps, ScanOps, TensorHandle

# These look at bits, not at numbers.
_ON_BITS = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift, np.where)


class Bf16Builder(interpreter.InterpreterBuilder):
    """The interpreter's operations, with bf16."""

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        """Any number to any number; Triton itself goes from bf16 to anything else by way of fp32."""
        if dst_type.scalar == tl.bfloat16 and not _is_bf16(src):
            return TensorHandle(_narrowed(src.data), tl.bfloat16)
        return super().cast_impl(_widened(src), dst_type)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        """A cast that names its rounding."""
        if dst_type.scalar == tl.bfloat16 and "RTNE" in str(rounding_mode):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> TensorHandle:
        """Products of bf16 are exact in fp32, in which a tensor core adds them."""
        _refuse_bf16("an accumulator", d)
        return super().create_dot(_widened(a), _widened(b), d, *options)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        """Arithmetic and comparison."""
        if op not in _ON_BITS:
            _refuse_bf16(op.__name__, lhs, rhs)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg: TensorHandle, op: Any) -> TensorHandle:
        """Functions of one number."""
        _refuse_bf16(op.__name__, arg)
        return super().unary_op(arg, op)

    def ternary_op(self, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Any) -> TensorHandle:
        """Choice and clamping."""
        if op not in _ON_BITS:
            _refuse_bf16(op.__name__, lhs, rhs, other)
        return super().ternary_op(lhs, rhs, other, op)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        """x * y + z."""
        _refuse_bf16("fma", x, y, z)
        return super().create_fma(x, y, z)


def install() -> None:
    """Put the interpreter of this process right; a second call changes nothing."""
    if isinstance(interpreter.interpreter_builder, Bf16Builder):
        return
    interpreter.interpreter_builder.__class__ = Bf16Builder
    reduce, scan = ReduceOps.apply_impl, ScanOps.apply_impl

    def checked_reduce(self: ReduceOps, blocks: tuple[Any, ...]) -> Any:
        _refuse_bf16("a reduction", *(block.handle for block in blocks))
        if self.combine_fn == tl.standard._xor_combine:  # tl.sort's, else computed element by element
            data = np.bitwise_xor.reduce(blocks[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
            return self.to_tensor(data, blocks[0].dtype)
        return reduce(self, blocks)

    def checked_scan(self: ScanOps, blocks: tuple[Any, ...]) -> Any:
        _refuse_bf16("a scan", *(block.handle for block in blocks))
        return scan(self, blocks)

    ReduceOps.apply_impl, ScanOps.apply_impl = checked_reduce, checked_scan


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _refuse_bf16(what: str, *handles: TensorHandle) -> None:
    if any(_is_bf16(handle) for handle in handles):
        raise TypeError(f"{what} in bf16; a kernel widens it with .to(tl.float32) first")


def _widened(handle: TensorHandle) -> TensorHandle:
    if not _is_bf16(handle):
        return handle
    bits = torch.from_numpy(handle.data.astype(np.int16))
    return TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)


def _narrowed(numbers: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(numbers.astype(np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)
