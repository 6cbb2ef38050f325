"""One layer of routed experts to compute: its inputs, and the exact answer, expert by expert.

Shapes: T tokens, K top-k, D model, F expert hidden, G = 2F gate and up, E experts, R rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import Shape

# What a layer gives: its output, and a gradient for each of its inputs.
RESULTS = ("y", "grad_x", "grad_weights", "grad_gate_up", "grad_down")


@dataclass(frozen=True)
class Problem:
    """Inputs scaled so that outputs and gradients are of order one.

    Attributes:
        shape: sizes.
        ids_TK: int64, the K experts of each token, drawn evenly: no expert has exactly its share.
        weights_TK: fp32 combine weights.
        x_TD: tokens.
        w_gate_up_EGD: gate rows first.
        w_down_EDF: down projection.
        grad_TD: gradient of the output.
    """

    shape: Shape
    ids_TK: Tensor
    weights_TK: Tensor
    x_TD: Tensor
    w_gate_up_EGD: Tensor
    w_down_EDF: Tensor
    grad_TD: Tensor


def make_problem(shape: Shape, dtype: torch.dtype, device: str, *, seed: int = 0) -> Problem:
    """The same numbers in every run on a device."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int, std: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=of).mul_(std)

    scores_TE = torch.rand(shape.T, shape.E, generator=generator, device=device)
    return Problem(
        shape=shape,
        ids_TK=scores_TE.topk(shape.K, dim=1).indices,
        weights_TK=normal(shape.T, shape.K, of=torch.float32).softmax(dim=1),
        x_TD=normal(shape.T, shape.H),
        w_gate_up_EGD=normal(shape.E, 2 * shape.I, shape.H, std=shape.H**-0.5),
        w_down_EDF=normal(shape.E, shape.H, shape.I, std=shape.I**-0.5),
        grad_TD=normal(shape.T, shape.H),
    )


@dataclass(frozen=True)
class Piece:
    """What one expert contributes, by autograd from plain torch operations in one dtype."""

    tokens_R: Tensor
    slots_R: Tensor  # which of its token's K experts it is
    y_RD: Tensor
    grad_x_RD: Tensor
    grad_weights_R: Tensor
    grad_gate_up_GD: Tensor
    grad_down_DF: Tensor


def one_expert(problem: Problem, expert: int, dtype: torch.dtype) -> Piece:
    """The expert's part of the answer, everything in `dtype`, the combine weights included."""
    tokens_R, slots_R = (problem.ids_TK == expert).nonzero(as_tuple=True)
    leaves = [
        tensor.detach().to(dtype).requires_grad_()
        for tensor in (
            problem.x_TD[tokens_R],
            problem.weights_TK[tokens_R, slots_R],
            problem.w_gate_up_EGD[expert],
            problem.w_down_EDF[expert],
        )
    ]
    x_RD, weights_R, w_gate_up_GD, w_down_DF = leaves
    gate_RF, up_RF = (x_RD @ w_gate_up_GD.T).chunk(2, dim=1)
    y_RD = (F.silu(gate_RF) * up_RF) @ w_down_DF.T * weights_R.unsqueeze(1)
    grads = torch.autograd.grad(y_RD, leaves, problem.grad_TD[tokens_R].to(dtype))
    return Piece(tokens_R, slots_R, y_RD.detach(), *grads)


def exact_and_plain(problem: Problem) -> Iterator[tuple[str, int | None, Tensor, Tensor]]:
    """Each result as it should be, and as plain torch in the problem's dtype has it.

    A gradient of all experts' weights is never held whole: large shapes would not fit.

    Yields:
        name of RESULTS; the expert whose slice it is, None for a whole tensor; the exact one (fp64 for fp32,
        else fp32); the plain one.
    """
    plain = problem.x_TD.dtype
    exact = torch.float64 if plain == torch.float32 else torch.float32
    sums = {dtype: _Sums(problem, dtype) for dtype in (exact, plain)}
    for expert in range(problem.shape.E):
        pieces = {dtype: one_expert(problem, expert, dtype) for dtype in (exact, plain)}
        for dtype, piece in pieces.items():
            sums[dtype].add(piece)
        yield "grad_gate_up", expert, pieces[exact].grad_gate_up_GD, pieces[plain].grad_gate_up_GD
        yield "grad_down", expert, pieces[exact].grad_down_DF, pieces[plain].grad_down_DF
    for name in ("y", "grad_x", "grad_weights"):
        yield name, None, getattr(sums[exact], name), getattr(sums[plain], name)


class _Sums:
    """The results that all experts make together."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.y = torch.zeros_like(problem.x_TD, dtype=dtype)
        self.grad_x = torch.zeros_like(self.y)
        self.grad_weights = torch.zeros_like(problem.weights_TK, dtype=dtype)

    def add(self, piece: Piece) -> None:
        # A token is at most once among an expert's rows.
        self.y[piece.tokens_R] += piece.y_RD
        self.grad_x[piece.tokens_R] += piece.grad_x_RD
        self.grad_weights[piece.tokens_R, piece.slots_R] = piece.grad_weights_R
