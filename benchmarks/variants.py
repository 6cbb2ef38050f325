"""Ways to compute a layer of experts: ours, plain torch, and the matrix products alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Mark, Step
from benchmarks.problem import Problem
from moe.kernels.expert_mlp import expert_mlp
from moe.kernels.permute_index import permute_index


class NotHereError(Exception):
    """A rival that is not installed, or cannot run on this device; the text says which."""


@dataclass(frozen=True)
class Variant:
    """One implementation, ready to run.

    Attributes:
        parameters: the weights in its own layout, each of which gets a gradient.
        forward: y of x and the combine weights; it knows the expert ids.
        ours: gradients of the parameters as those of w_gate_up and w_down.
        fp8_products: of 8-bit operands, whose errors add up one after another.
    """

    parameters: Sequence[Tensor]
    forward: Callable[[Tensor, Tensor], Tensor]
    ours: Callable[..., tuple[Tensor, Tensor]] = lambda gate_up, down: (gate_up, down)
    fp8_products: int = 0


class Runner:
    """Runs a variant on a problem: its results to be judged, its steps to be timed, what it saves."""

    def __init__(self, problem: Problem, variant: Variant) -> None:
        self.problem = problem
        self.variant = variant
        self.x_TD = problem.x_TD.detach().requires_grad_()
        self.weights_TK = problem.weights_TK.detach().requires_grad_()
        self.leaves = [self.x_TD, self.weights_TK, *variant.parameters]

    def forward(self) -> Tensor:
        """y, with what its backward needs."""
        return self.variant.forward(self.x_TD, self.weights_TK)

    def step(self, mark: Mark) -> None:
        """Forward and backward, two parts."""
        y_TD = self.forward()
        mark()
        grads = torch.autograd.grad(y_TD, self.leaves, self.problem.grad_TD)
        mark()
        del grads  # training frees gradients after the optimizer has used them: not a part of the backward

    def results(self) -> dict[str, Tensor]:
        """A tensor for each of RESULTS."""
        y_TD = self.forward()
        grad_x, grad_weights, *grads = torch.autograd.grad(y_TD, self.leaves, self.problem.grad_TD)
        grad_gate_up, grad_down = self.variant.ours(*grads)
        return {
            "y": y_TD.detach(),
            "grad_x": grad_x,
            "grad_weights": grad_weights,
            "grad_gate_up": grad_gate_up,
            "grad_down": grad_down,
        }

    def saved_bytes(self) -> int:
        """Memory that autograd keeps between forward and backward, the parameters not counted.

        Every storage is counted once and whole, as a saved view keeps all of it. What is hidden from autograd
        is not seen.
        """
        ours = {tensor.untyped_storage().data_ptr() for tensor in self.variant.parameters}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in ours:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y_TD = self.forward()  # alive until all is counted: a freed address would be given out again
        del y_TD
        return sum(kept.values())


def ours(problem: Problem, *, precision: str = "wide", wide_into_activation: bool = False) -> Variant:
    """JouleMoE from the expert ids on: the index of the pairs, then expert_mlp."""
    options = {"precision": precision, "wide_into_activation": wide_into_activation}
    ids_N = problem.ids_TK.flatten()
    gate_up, down = leaves_of(problem.w_gate_up_EGD, problem.w_down_EDF)

    def forward(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        index = permute_index(ids_N, problem.shape.E)
        return expert_mlp(x_TD, gate_up, down, weights_TK, index, **options)

    in_a_row = 0 if precision == "wide" else 1 if wide_into_activation else 3
    return Variant((gate_up, down), forward, fp8_products=in_a_row)


def ours_fp8(problem: Problem, *, wide_into_activation: bool = False) -> Variant:
    """The same with FP8 products: blocks of 128 on H100 and H200, MXFP8 from B200 on; all six, or four."""
    if not problem.x_TD.is_cuda:
        raise NotHereError("it is measured on CUDA only; a CPU emulates FP8")
    if problem.x_TD.dtype != torch.bfloat16:
        raise NotHereError(f"it is measured on bf16, not on {problem.x_TD.dtype}")
    precision = "fp8" if torch.cuda.get_device_capability()[0] < 10 else "mxfp8"
    return ours(problem, precision=precision, wide_into_activation=wide_into_activation)


def torch_grouped_mm(problem: Problem) -> Variant:
    """As torch's own examples do it: sort, gather, F.grouped_mm, activation, F.grouped_mm, sum."""
    if not hasattr(F, "grouped_mm"):
        raise NotHereError(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
    ids_N = problem.ids_TK.flatten()
    rows_N = torch.arange(ids_N.numel(), device=ids_N.device)
    w_gate_up_EGD, w_down_EDF = leaves_of(problem.w_gate_up_EGD, problem.w_down_EDF)

    def forward(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        sorted_N, order_N = ids_N.sort(stable=True)
        experts_E = torch.arange(problem.shape.E, device=ids_N.device)
        ends_E = torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True)
        tokens_N = order_N // problem.shape.K
        h_NG = F.grouped_mm(x_TD[tokens_N], w_gate_up_EGD.transpose(1, 2), offs=ends_E)
        gate_NF, up_NF = h_NG.chunk(2, dim=1)
        y_ND = F.grouped_mm(F.silu(gate_NF) * up_NF, w_down_EDF.transpose(1, 2), offs=ends_E)
        y_ND = y_ND * weights_TK.flatten()[order_N].unsqueeze(1).to(y_ND.dtype)
        inverse_N = torch.empty_like(order_N).scatter_(0, order_N, rows_N)
        return y_ND[inverse_N].view(*weights_TK.shape, -1).sum(dim=1)

    return Variant((w_gate_up_EGD, w_down_EDF), forward)


def leaves_of(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same memory, as parameters that nobody else has gradients for."""
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def dense_products(problem: Problem) -> Step:
    """The layer's six matrix products as one dense feed-forward of all its rows, and nothing else."""
    N, dtype, device = problem.shape.pairs, problem.x_TD.dtype, problem.x_TD.device
    w_gate_up_GD, w_down_DF = problem.w_gate_up_EGD[0], problem.w_down_EDF[0]
    x_ND, grad_ND, a_NF, grad_h_NG = (
        torch.randn(N, columns, dtype=dtype, device=device)
        for columns in (problem.shape.H, problem.shape.H, problem.shape.I, 2 * problem.shape.I)
    )

    def step(mark: Mark) -> None:
        _ = x_ND @ w_gate_up_GD.T
        _ = a_NF @ w_down_DF.T
        mark()
        _ = grad_ND @ w_down_DF
        _ = grad_ND.T @ a_NF
        _ = grad_h_NG @ w_gate_up_GD
        _ = grad_h_NG.T @ x_ND
        mark()

    return step
