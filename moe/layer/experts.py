"""The routed experts of one rank. e experts here, D model, F expert hidden (its slice here), G = 2F."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.kernels.expert_mlp import expert_mlp
from moe.layer.config import MoEConfig
from moe.layer.types import Dispatched


class GroupedExperts(nn.Module):
    """Experts as two stacked weights, computed by grouped GEMMs.

    Gate and up share one weight (gate rows first, the order of Hugging Face's fused experts), so a token's
    row is read once.

    Attributes:
        adds_to_main_grads: The backward adds the gradients of the two weights to their `main_grad`, which an
            engine made in fp32, and the forward marks them with Megatron-Core's `grad_added_to_main_grad`.
    """

    def __init__(
        self,
        config: MoEConfig,
        num_local_experts: int,
        *,
        slices: int = 1,
        slice_here: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Build the experts of this rank, their weights undefined.

        Args:
            config: of the layer.
            num_local_experts: e.
            slices: ranks that split each expert: gate, up and down projection along F. Their outputs are
                partial sums, to be added; the bias of the down projection is split over its D elements, so
                that each is added once.
            slice_here: which of them this is.
            dtype: of the weights.
            device: of the weights.

        Raises:
            ValueError: if an expert cannot be split so.
        """
        super().__init__()
        self.config = config
        self.slices, self.slice_here = slices, slice_here
        self.adds_to_main_grads = False
        e, D = num_local_experts, config.hidden_size
        hidden, rest = divmod(config.expert_hidden_size, slices)
        if rest or (config.expert_bias and D % slices):
            raise ValueError(
                f"experts of expert_hidden_size={config.expert_hidden_size} and hidden_size={D} cannot be "
                f"split over {slices} expert-tensor-parallel ranks"
            )
        self.w_gate_up_eGD = nn.Parameter(torch.empty(e, 2 * hidden, D, dtype=dtype, device=device))
        self.w_down_eDF = nn.Parameter(torch.empty(e, D, hidden, dtype=dtype, device=device))
        self.b_gate_up_eG: nn.Parameter | None = None
        self.b_down_eD: nn.Parameter | None = None
        if config.expert_bias:
            self.b_gate_up_eG = nn.Parameter(torch.zeros(e, 2 * hidden, dtype=dtype, device=device))
            self.b_down_eD = nn.Parameter(torch.zeros(e, D // slices, dtype=dtype, device=device))

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
        """y_RD: for each row that arrived the weighted sum over its pairs' experts, of a slice a partial sum.

        Args:
            x_RD: dispatched.x_RD. By itself, because DeepSpeed's ZeRO-3 frees a module's weights when the
                gradients of its tensor arguments are there; it does not look into dataclasses.
            dispatched: what a dispatcher gave.
        """
        biases = None
        if self.b_gate_up_eG is not None and self.b_down_eD is not None:
            biases = (self.b_gate_up_eG, self._own_elements(self.b_down_eD))
        return expert_mlp(
            x_RD,
            self.w_gate_up_eGD,
            self.w_down_eDF,
            dispatched.weights_RK,
            dispatched.index,
            activation=self.config.activation,
            biases=biases,
            precision=self.config.precision,
            compress_h=self.config.fp8_input_store,
            wide_into_activation=self.config.wide_into_activation,
            main_grads=self._main_grads(),
            backend=self.config.backend,
        )

    def _main_grads(self) -> tuple[Tensor, Tensor] | None:
        weights = (self.w_gate_up_eGD, self.w_down_eDF)
        frozen = not all(weight.requires_grad for weight in weights)
        if not self.adds_to_main_grads or frozen or not torch.is_grad_enabled():
            return None
        for weight in weights:
            weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return self.w_gate_up_eGD.main_grad, self.w_down_eDF.main_grad  # type: ignore[attr-defined]

    def _own_elements(self, b_down_eD: Tensor) -> Tensor:
        """The whole bias, zero where other slices have its elements."""
        if self.slices == 1:
            return b_down_eD
        here = b_down_eD.shape[1]
        before = self.slice_here * here
        return F.pad(b_down_eD, (before, self.config.hidden_size - before - here))
