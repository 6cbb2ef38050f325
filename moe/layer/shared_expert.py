"""The shared expert: a SwiGLU feed-forward that every token passes. T tokens, D model, F hidden."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SharedExpert(nn.Module):
    """down(silu(gate(x)) * up(x)), as in DeepSeekMoE (arXiv 2401.06066)."""

    def __init__(
        self,
        hidden_size: int,
        shared_hidden_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.w_gate_up_GD = nn.Parameter(
            torch.empty(2 * shared_hidden_size, hidden_size, dtype=dtype, device=device)
        )
        self.w_down_DF = nn.Parameter(
            torch.empty(hidden_size, shared_hidden_size, dtype=dtype, device=device)
        )

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal initialisation with the given standard deviation."""
        nn.init.normal_(self.w_gate_up_GD, std=std)
        nn.init.normal_(self.w_down_DF, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """The output, of the shape of x, [..., D]."""
        gate, up = F.linear(x, self.w_gate_up_GD).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.w_down_DF)
