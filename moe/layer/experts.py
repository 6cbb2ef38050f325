"""The routed experts of one rank. e experts here, D model, F expert hidden, G = 2F."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.kernels.expert_mlp import expert_mlp
from moe.layer.config import MoEConfig
from moe.layer.types import Dispatched


class GroupedExperts(nn.Module):
    """Experts as two stacked weights, computed by grouped GEMMs.

    Gate and up share one weight (gate rows first, the order of Hugging Face's fused experts), so a token's
    row is read once.
    """

    def __init__(
        self,
        config: MoEConfig,
        num_local_experts: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Build the experts of this rank, their weights undefined.

        Args:
            config: of the layer.
            num_local_experts: e.
            dtype: of the weights.
            device: of the weights.
        """
        super().__init__()
        self.config = config
        e, D, F = num_local_experts, config.hidden_size, config.expert_hidden_size
        self.w_gate_up_eGD = nn.Parameter(torch.empty(e, 2 * F, D, dtype=dtype, device=device))
        self.w_down_eDF = nn.Parameter(torch.empty(e, D, F, dtype=dtype, device=device))
        self.b_gate_up_eG: nn.Parameter | None = None
        self.b_down_eD: nn.Parameter | None = None
        if config.expert_bias:
            self.b_gate_up_eG = nn.Parameter(torch.zeros(e, 2 * F, dtype=dtype, device=device))
            self.b_down_eD = nn.Parameter(torch.zeros(e, D, dtype=dtype, device=device))

    def reset_parameters(self, std: float = 0.02, *, seed: int | None = None) -> None:
        """Normal initialisation with the given standard deviation; biases start at zero.

        Args:
            std: of the weights.
            seed: of the weights; by default torch's own generator goes on.
        """
        generator = None
        if seed is not None:
            generator = torch.Generator(device=self.w_down_eDF.device).manual_seed(seed)
        nn.init.normal_(self.w_gate_up_eGD, std=std, generator=generator)
        nn.init.normal_(self.w_down_eDF, std=std, generator=generator)
        for bias in (self.b_gate_up_eG, self.b_down_eD):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """y_RD: for each row that arrived the weighted sum over its pairs' experts.

        Args:
            x_RD: dispatched.x_RD. By itself, because DeepSpeed's ZeRO-3 frees a module's weights when the
                gradients of its tensor arguments are there; it does not look into dataclasses.
            dispatched: what a dispatcher gave.
        """
        biases = None
        if self.b_gate_up_eG is not None and self.b_down_eD is not None:
            biases = (self.b_gate_up_eG, self.b_down_eD)
        return expert_mlp(
            x_RD,
            self.w_gate_up_eGD,
            self.w_down_eDF,
            dispatched.weights_RK,
            dispatched.index,
            activation=self.config.activation,
            biases=biases,
            precision=self.config.precision,
            backend=self.config.backend,
        )
