"""The router: tokens to expert ids and weights. T tokens, D model, E experts, K top-k."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.kernels.token_drop import capacity_limit, token_rounding
from moe.kernels.topk_route import topk_route, topk_route_with_sums
from moe.layer.config import MoEConfig
from moe.layer.types import Routing


class Router(nn.Module):
    """A linear gate in fp32, then top-k.

    The gate stays in fp32 in a bf16 model: a rounded logit changes which experts a token meets
    (Switch Transformer, arXiv 2101.03961, section 2.4).
    `bias_E` steers only the choice (auxiliary-loss-free balancing, arXiv 2408.15664); `balance.updated_bias`
    moves it once a step. With a capacity or with rounding, what a token gets depends on its rank's other
    tokens; rounding and jitter act in training only.
    """

    bias_E: Tensor

    def __init__(self, config: MoEConfig, *, device: torch.device | str | None = None) -> None:
        """Build the gate, its weights undefined.

        Args:
            config: of the layer.
            device: of the weights.
        """
        super().__init__()
        self.config = config
        E, D = config.num_experts, config.hidden_size
        self.weight_ED = nn.Parameter(torch.empty(E, D, dtype=torch.float32, device=device))
        self.b_E: nn.Parameter | None = None
        if config.logit_bias:
            self.b_E = nn.Parameter(torch.zeros(E, dtype=torch.float32, device=device))
        self.register_buffer("bias_E", torch.zeros(E, dtype=torch.float32, device=device))

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal initialisation with the given standard deviation; the biases start at zero."""
        nn.init.normal_(self.weight_ED, std=std)
        nn.init.zeros_(self.bias_E)
        if self.b_E is not None:
            nn.init.zeros_(self.b_E)

    def forward(self, x_TD: Tensor, *, num_sequences: int = 0) -> Routing:
        """Route T tokens.

        Args:
            x_TD: token t belongs to sequence t % num_sequences.
            num_sequences: sequences whose sums the router losses need; 0 sums nothing.
        """
        config = self.config
        if config.jitter and self.training:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - config.jitter, 1 + config.jitter)
        logits_TE = gate(x_TD, self.weight_ED)
        if self.b_E is not None:
            logits_TE = logits_TE + self.b_E
        options: dict[str, Any] = {
            "score": config.score,
            "score_before_topk": config.score_before_topk,
            "renormalize": config.renormalize,
            "scale": config.scale,
            "bias_E": self.bias_E,
            "num_groups": config.num_groups,
            "top_groups": config.top_groups,
            "backend": config.backend,
        }
        sums = None
        if num_sequences == 0:
            ids_TK, weights_TK, counts_E = topk_route(logits_TE, config.top_k, **options)
        else:
            ids_TK, weights_TK, sums = topk_route_with_sums(
                logits_TE, config.top_k, num_sequences=num_sequences, **options
            )
            counts_E = sums.counts_BE.sum(dim=0)
        return self._drop(Routing(ids_TK, weights_TK, counts_E, sums))

    def _drop(self, routing: Routing) -> Routing:
        """Without the pairs beyond an expert's capacity, or beyond its whole tiles."""
        config = self.config
        ids_TK, weights_TK, counts_E = routing.ids_TK, routing.weights_TK, routing.counts_E
        capacity = config.capacity(ids_TK.shape[0])
        if capacity is not None:
            ids_TK, weights_TK, counts_E = capacity_limit(
                ids_TK, weights_TK, config.num_experts, capacity, backend=config.backend
            )
        if config.rounding != "none" and self.training:
            ids_TK, weights_TK, counts_E = token_rounding(
                ids_TK,
                weights_TK,
                config.num_experts,
                config.tile_rows,
                rounding=config.rounding,
                backend=config.backend,
            )
        return Routing(ids_TK, weights_TK, counts_E, routing.sums)


class _Gate(torch.autograd.Function):
    """The backward keeps x as it came: autograd would keep its fp32 copy, twice the bytes of a bf16 x."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(x_TD.float(), weight_ED)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        return (grad_TE @ weight_ED).to(x_TD.dtype), grad_TE.T @ x_TD.float()


def gate(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """The logits_TE = x @ weight.T in fp32, for x of any floating dtype and fp32 weights."""
    logits_TE: Tensor = _Gate.apply(x_TD, weight_ED)  # type: ignore[no-untyped-call]
    return logits_TE
