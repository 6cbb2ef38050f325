"""Triton's interpreter, put right for our kernels: tests without a GPU run them on the CPU.

Triton 3.7 keeps bf16 and fp8 as raw bits there: a cast from fp32 cuts bits off where a GPU rounds, and in fp8
overflows where a GPU saturates; arithmetic is done on the bits, silently wrong. Here casts round to nearest
even and tl.dot takes narrow operands. Other arithmetic on them raises: our kernels widen to fp32 first.
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


# Numbers that numpy does not know: a block of them holds unsigned integers of their size.
_NARROW = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}


class NarrowBuilder(interpreter.InterpreterBuilder):
    """The interpreter's operations, with bf16 and fp8."""

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        """Any number to any number; Triton itself goes from a narrow one to anything else by way of fp32."""
        if dst_type.scalar in _NARROW and src.dtype.scalar != dst_type.scalar:
            return TensorHandle(_narrowed(_widened(src).data, dst_type.scalar), dst_type.scalar)
        return super().cast_impl(_widened(src), dst_type)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        """A cast that names its rounding."""
        if _is_narrow(src) or (dst_type.scalar in _NARROW and "RTNE" in str(rounding_mode)):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> TensorHandle:
        """Products of narrow numbers are exact in fp32, in which they are added here."""
        _refuse_narrow("an accumulator", d)
        return super().create_dot(_widened(a), _widened(b), d, *options)

    def create_dot_scaled(self, lhs: TensorHandle, lhs_scale: TensorHandle, *options: Any) -> TensorHandle:
        """The product of two MXFP8 operands, which Triton's own interpreter has from 3.8 on."""
        _, rhs, rhs_scale, _, _, _, _, total = options
        left = _widened(lhs).data * _scales(lhs_scale)
        right = _widened(rhs).data * _scales(rhs_scale).T
        return TensorHandle(total.data + np.matmul(left, right), tl.float32)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        """Arithmetic and comparison."""
        if op not in _ON_BITS:
            _refuse_narrow(op.__name__, lhs, rhs)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg: TensorHandle, op: Any) -> TensorHandle:
        """Functions of one number."""
        _refuse_narrow(op.__name__, arg)
        return super().unary_op(arg, op)

    def ternary_op(self, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Any) -> TensorHandle:
        """Choice and clamping."""
        if op not in _ON_BITS:
            _refuse_narrow(op.__name__, lhs, rhs, other)
        return super().ternary_op(lhs, rhs, other, op)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        """x * y + z."""
        _refuse_narrow("fma", x, y, z)
        return super().create_fma(x, y, z)


def install() -> None:
    """Put the interpreter of this process right; a second call changes nothing."""
    if isinstance(interpreter.interpreter_builder, NarrowBuilder):
        return
    interpreter.interpreter_builder.__class__ = NarrowBuilder
    reduce, scan = ReduceOps.apply_impl, ScanOps.apply_impl

    def checked_reduce(self: ReduceOps, blocks: tuple[Any, ...]) -> Any:
        _refuse_narrow("a reduction", *(block.handle for block in blocks))
        if self.combine_fn == tl.standard._xor_combine:  # tl.sort's, else computed element by element
            data = np.bitwise_xor.reduce(blocks[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
            return self.to_tensor(data, blocks[0].dtype)
        return reduce(self, blocks)

    def checked_scan(self: ScanOps, blocks: tuple[Any, ...]) -> Any:
        _refuse_narrow("a scan", *(block.handle for block in blocks))
        return scan(self, blocks)

    ReduceOps.apply_impl, ScanOps.apply_impl = checked_reduce, checked_scan


def _is_narrow(handle: TensorHandle) -> bool:
    return handle.dtype.scalar in _NARROW


def _refuse_narrow(what: str, *handles: TensorHandle) -> None:
    for handle in filter(_is_narrow, handles):
        raise TypeError(f"{what} in {handle.dtype.scalar}; a kernel widens it with .to(tl.float32) first")


def _widened(handle: TensorHandle) -> TensorHandle:
    if not _is_narrow(handle):
        return handle
    numbers = torch.from_numpy(handle.data).view(_NARROW[handle.dtype.scalar])
    return TensorHandle(numbers.float().numpy(), tl.float32)


def _scales(handle: TensorHandle) -> np.ndarray:
    """A byte for every 32 numbers: the exponent of a power of two."""
    numbers = torch.from_numpy(handle.data).view(torch.float8_e8m0fnu).float()
    return numbers.repeat_interleave(32, dim=1).numpy()


def _narrowed(numbers: np.ndarray, to: tl.dtype) -> np.ndarray:
    dtype = _NARROW[to]
    wide = torch.from_numpy(numbers.astype(np.float32))
    if dtype.itemsize == 1:  # a GPU takes the largest number for what is larger, and keeps NaN
        wide = wide.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return wide.to(dtype).view(torch.uint16 if dtype.itemsize == 2 else torch.uint8).numpy()
