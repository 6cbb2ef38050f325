"""SwiGLU experts (arXiv 2002.05202) over rows in expert order: checks, then the torch backend.

Shapes: R rows, D model, F expert hidden, G = 2F gate and up, e experts held here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT_BYTES = 16  # a grouped GEMM loads whole vectors: each row of an operand starts at a multiple


def expert_mlp(x_RD: Tensor, w_gate_up_eGD: Tensor, w_down_eDF: Tensor, ends_e: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) with each row's expert.

    Args:
        x_RD: rows sorted by expert.
        w_gate_up_eGD: gate rows first, then up rows.
        w_down_eDF: down projection.
        ends_e: int32, expert i owns rows ends[i-1] to ends[i]; the last is R. An empty expert gets zero
            gradients.

    Returns:
        y_RD.

    Raises:
        ValueError: for shapes or dtypes that do not fit together, or rows that are not multiples of 16 bytes.
    """
    _check(x_RD, w_gate_up_eGD, w_down_eDF, ends_e)
    h_RG = F.grouped_mm(x_RD, w_gate_up_eGD.transpose(1, 2), offs=ends_e)
    gate_RF, up_RF = h_RG.chunk(2, dim=-1)
    y_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, w_down_eDF.transpose(1, 2), offs=ends_e)
    # grouped_mm's backward refuses an expanded gradient, such as the one of y.sum().
    out_RD: Tensor = _DenseGradient.apply(y_RD)  # type: ignore[no-untyped-call]
    return out_RD


def _check(x_RD: Tensor, w_gate_up_eGD: Tensor, w_down_eDF: Tensor, ends_e: Tensor) -> None:
    if x_RD.dim() != 2 or w_gate_up_eGD.dim() != 3 or w_down_eDF.dim() != 3:
        shapes = [tuple(t.shape) for t in (x_RD, w_gate_up_eGD, w_down_eDF)]
        raise ValueError(f"expected x [R, D], gate_up [e, 2F, D] and down [e, D, F], got {shapes}")
    e, G, D = w_gate_up_eGD.shape
    if w_down_eDF.shape != (e, D, G // 2) or G % 2 or x_RD.shape[1] != D:
        raise ValueError(
            f"gate_up {tuple(w_gate_up_eGD.shape)} needs down [{e}, {D}, {G // 2}] and x [R, {D}], "
            f"got down {tuple(w_down_eDF.shape)} and x {tuple(x_RD.shape)}"
        )
    if ends_e.shape != (e,) or ends_e.dtype != torch.int32:
        raise ValueError(f"ends must be int32 of shape [{e}], got {ends_e.dtype} {tuple(ends_e.shape)}")
    if not x_RD.dtype == w_gate_up_eGD.dtype == w_down_eDF.dtype:
        raise ValueError(
            f"one dtype is needed, got x {x_RD.dtype}, gate_up {w_gate_up_eGD.dtype}, down {w_down_eDF.dtype}"
        )
    if x_RD.dtype not in DTYPES:
        raise ValueError(f"dtype {x_RD.dtype} is not supported; allowed: {', '.join(map(str, DTYPES))}")
    multiple = ALIGNMENT_BYTES // x_RD.element_size()
    if D % multiple or w_down_eDF.shape[2] % multiple:
        raise ValueError(
            f"model size {D} and expert hidden size {w_down_eDF.shape[2]} must be multiples of {multiple} in "
            f"{x_RD.dtype} ({ALIGNMENT_BYTES} bytes)"
        )


class _DenseGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor) -> Tensor:
        return y_RD.view_as(y_RD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> Tensor:
        # By strides, not is_contiguous(): an empty tensor counts as contiguous whatever its strides.
        if grad_RD.stride() == (grad_RD.shape[1], 1):
            return grad_RD
        return grad_RD.clone(memory_format=torch.contiguous_format)
