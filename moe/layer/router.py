"""The router: tokens to expert ids and weights. T tokens, D model, E experts, K top-k."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.kernels.token_rounding import token_rounding
from moe.kernels.topk_route import topk_route, topk_route_with_sums
from moe.layer.types import Routing


class Router(nn.Module):
    """A linear gate in fp32, then top-k.

    The gate stays in fp32 in a bf16 model: a rounded logit changes which experts a token meets
    (Switch Transformer, arXiv 2101.03961, section 2.4).
    `bias_E` steers only the choice (auxiliary-loss-free balancing, arXiv 2408.15664); `balance.updated_bias`
    moves it once a step. With `rounding`, pairs that would leave an expert's last tile of rows mostly empty
    are dropped in training (`token_rounding`); what a token gets then depends on its rank's other tokens.
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
        num_groups: int = 1,
        top_groups: int = 1,
        rounding: str = "none",
        tile_rows: int = 128,
        backend: str = "auto",
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.score = score
        self.score_before_topk = score_before_topk
        self.renormalize = renormalize
        self.scale = scale
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.rounding = rounding
        self.tile_rows = tile_rows
        self.backend = backend
        self.weight_ED = nn.Parameter(
            torch.empty(num_experts, hidden_size, dtype=torch.float32, device=device)
        )
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32, device=device))

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal initialisation with the given standard deviation; the bias starts at zero."""
        nn.init.normal_(self.weight_ED, std=std)
        nn.init.zeros_(self.bias_E)

    def forward(self, x_TD: Tensor, *, num_sequences: int = 0) -> Routing:
        """Route T tokens.

        Args:
            x_TD: token t belongs to sequence t % num_sequences.
            num_sequences: sequences whose sums the router losses need; 0 sums nothing.
        """
        logits_TE = gate(x_TD, self.weight_ED)
        options: dict[str, Any] = {
            "score": self.score,
            "score_before_topk": self.score_before_topk,
            "renormalize": self.renormalize,
            "scale": self.scale,
            "bias_E": self.bias_E,
            "num_groups": self.num_groups,
            "top_groups": self.top_groups,
            "backend": self.backend,
        }
        sums = None
        if num_sequences == 0:
            ids_TK, weights_TK, counts_E = topk_route(logits_TE, self.top_k, **options)
        else:
            ids_TK, weights_TK, sums = topk_route_with_sums(
                logits_TE, self.top_k, num_sequences=num_sequences, **options
            )
            counts_E = sums.counts_BE.sum(dim=0)
        if self.rounding != "none" and self.training:
            ids_TK, weights_TK, counts_E = token_rounding(
                ids_TK,
                weights_TK,
                counts_E.shape[0],
                self.tile_rows,
                rounding=self.rounding,
                backend=self.backend,
            )
        return Routing(ids_TK, weights_TK, counts_E, sums)


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
