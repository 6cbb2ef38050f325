"""Quantisation to FP8 in blocks, for GEMMs in low precision."""

from moe.kernels.quantize.op import quantize_columns, quantize_rows, quantize_weights

__all__ = ["quantize_columns", "quantize_rows", "quantize_weights"]
