"""The routed experts of one rank. e experts here, D model, F expert hidden, G = 2F."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.kernels.expert_mlp import expert_mlp
from moe.layer.types import Dispatched


class GroupedExperts(nn.Module):
    """SwiGLU experts as two stacked weights, computed by grouped GEMMs.

    Gate and up share one weight (gate rows first, the order of Hugging Face's fused experts), so a token's
    row is read once.
    """

    def __init__(
        self,
        num_local_experts: int,
        hidden_size: int,
        expert_hidden_size: int,
        *,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        e, D, F = num_local_experts, hidden_size, expert_hidden_size
        self.w_gate_up_eGD = nn.Parameter(torch.empty(e, 2 * F, D, dtype=dtype, device=device))
        self.w_down_eDF = nn.Parameter(torch.empty(e, D, F, dtype=dtype, device=device))

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal initialisation with the given standard deviation."""
        nn.init.normal_(self.w_gate_up_eGD, std=std)
        nn.init.normal_(self.w_down_eDF, std=std)

    def forward(self, dispatched: Dispatched) -> Tensor:
        """y_RD: for each row that arrived the weighted sum over its pairs' experts."""
        x_RD, weights_RK = dispatched.x_RD, dispatched.weights_RK
        return expert_mlp(
            x_RD, self.w_gate_up_eGD, self.w_down_eDF, weights_RK, dispatched.index, backend=self.backend
        )
