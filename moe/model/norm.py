"""Norms and small layers under tensor and sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) that works under sequence parallelism.

    Each tensor-parallel rank normalises its own positions, so the weight's gradient is partial: the mark
    `sequence_parallel` makes Megatron sum it over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class ReplicatedLinear(nn.Module):
    """A linear without bias whose weight every tensor-parallel rank holds whole; marked like RMSNorm's."""

    def __init__(self, config: TransformerConfig, input_size: int, output_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Project the last dimension."""
        return F.linear(x, self.weight)


class HeadVector(nn.Module):
    """A vector whose elements belong to heads and are split over tp with them."""

    def __init__(self, config: TransformerConfig, size: int, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.weight = nn.Parameter(torch.ones(size // tp_group.size(), dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self) -> Tensor:
        """The vector; called, not read, so that hooks of the data-parallel wrapper see its use."""
        return self.weight

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Split over tp, replicated over dp."""
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        return sharded


class AllHeadsNorm(HeadVector):
    """RMSNorm over all heads together, of which each tensor-parallel rank has some (OLMoE's query-key norm).

    The mean square is summed over the ranks, and its gradient too.
    """

    def __init__(self, config: TransformerConfig, size: int, eps: float, tp_group: dist.ProcessGroup) -> None:
        super().__init__(config, size, tp_group)
        self.size, self.eps = size, eps

    def forward(self, x_SBHd: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise the last two dimensions, heads and their elements."""
        x_SBw = x_SBHd.flatten(2).float()
        square = x_SBw.square().sum(dim=-1, keepdim=True)
        square = reduce_from_tensor_model_parallel_region(square, group=self.tp_group)
        square = copy_to_tensor_model_parallel_region(square, group=self.tp_group)
        y_SBw = x_SBw * torch.rsqrt(square / self.size + self.eps) * self.weight
        return y_SBw.to(x_SBHd.dtype).view_as(x_SBHd)
