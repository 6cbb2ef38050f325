"""The router: tokens to expert ids and weights. T tokens, D model, E experts, K top-k."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.kernels.topk_route import topk_route
from moe.layer.types import Routing


class Router(nn.Module):
    """A linear gate in fp32, then top-k.

    The gate stays in fp32 in a bf16 model: a rounded logit changes which experts a token meets
    (Switch Transformer, arXiv 2101.03961, section 2.4).
    `bias_E` steers only the choice (auxiliary-loss-free balancing, arXiv 2408.15664); `balance.updated_bias`
    moves it once a step.
    """

    bias_E: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        score_before_topk: bool = True,
        renormalize: bool = False,
        scale: float = 1.0,
        backend: str = "auto",
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.score = score
        self.score_before_topk = score_before_topk
        self.renormalize = renormalize
        self.scale = scale
        self.backend = backend
        self.weight_ED = nn.Parameter(
            torch.empty(num_experts, hidden_size, dtype=torch.float32, device=device)
        )
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32, device=device))

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal initialisation with the given standard deviation; the bias starts at zero."""
        nn.init.normal_(self.weight_ED, std=std)
        nn.init.zeros_(self.bias_E)

    def forward(self, x_TD: Tensor) -> Routing:
        """Route T tokens."""
        logits_TE = F.linear(x_TD.float(), self.weight_ED)
        ids_TK, weights_TK, counts_E = topk_route(
            logits_TE,
            self.top_k,
            score=self.score,
            score_before_topk=self.score_before_topk,
            renormalize=self.renormalize,
            scale=self.scale,
            bias_E=self.bias_E,
            backend=self.backend,
        )
        return Routing(ids_TK, weights_TK, counts_E, logits_TE)
