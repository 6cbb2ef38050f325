"""What a layer is: sizes, routing, balance. One object, checked as a whole, no process groups or devices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moe.kernels.backend import BACKENDS
from moe.kernels.expert_mlp import ACTIVATIONS, PRECISIONS
from moe.kernels.token_drop import ROUNDINGS
from moe.kernels.topk_route import SCORES
from moe.layer.balance import AUX_LOSSES, BalanceSettings


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Of one layer.

    Attributes:
        hidden_size: D.
        num_experts: E, over all expert-parallel ranks.
        top_k: experts a token, K.
        expert_hidden_size: F.
        shared_expert_hidden_size: of an expert that every token passes (arXiv 2401.06066); 0 has none.
        activation: `swiglu`, `geglu` (both arXiv 2002.05202), or `clamped_swiglu` of gpt-oss.
        expert_bias: experts have biases, as gpt-oss's.
        precision: of the experts' products: `wide` is their dtype; others quantise (kernels.quantize), swiglu
            experts without biases only.
        fp8_input_store: the input of the activation is saved for the backward in that precision, too, in half
            the memory; the forward computes with what is saved.
        wide_into_activation: the products that lead into the activation and its backward, a third of the
            work, are not quantised: all errors are then within what DeepGEMM's tests allow of one product.
        score: `softmax` or `sigmoid` of the logits.
        score_before_topk: False takes the softmax over the chosen logits only (Mixtral, gpt-oss).
        renormalize: divide the chosen weights by their sum.
        scale: multiplies the weights.
        num_groups: of experts, for group-limited routing (DeepSeek-V3, arXiv 2412.19437).
        top_groups: that a token's experts come from.
        logit_bias: the gate has a trained bias (gpt-oss).
        jitter: in training the gate's input is multiplied by 1 +- this, at random (Switch, arXiv 2101.03961).
        capacity_factor: an expert keeps at most this times its fair share of its rank's pairs; 0 drops none.
        rounding: `none`, or how experts' rows are dropped to whole tiles in training (kernels.token_drop).
        tile_rows: of such a tile.
        aux_loss: scope of the balance loss: `none`, `sequence`, `batch`, or `global`, the batch of all ranks.
        aux_loss_coeff: its strength.
        z_loss_coeff: of the squared log-sum-exp of the logits (arXiv 2202.08906).
        init_std: of the normal distribution that weights are drawn from.
        batch_first: tokens come as [B, S, D]; otherwise [S, B, D].
        backend: of the kernels: `auto` is triton on CUDA and torch elsewhere.

    Raises:
        ValueError: naming every field that cannot work.
    """

    hidden_size: int
    num_experts: int
    top_k: int
    expert_hidden_size: int
    shared_expert_hidden_size: int = 0
    activation: str = "swiglu"
    expert_bias: bool = False
    precision: str = "wide"
    fp8_input_store: bool = False
    wide_into_activation: bool = False
    score: str = "softmax"
    score_before_topk: bool = True
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    logit_bias: bool = False
    jitter: float = 0.0
    capacity_factor: float = 0.0
    rounding: str = "none"
    tile_rows: int = 128
    aux_loss: str = "none"
    aux_loss_coeff: float = 0.0
    z_loss_coeff: float = 0.0
    init_std: float = 0.02
    batch_first: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        problems = [*self._names(), *self._sizes()]
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def balance(self) -> BalanceSettings:
        """The router losses."""
        return BalanceSettings(self.aux_loss, self.aux_loss_coeff, self.z_loss_coeff)

    def capacity(self, num_tokens: int) -> int | None:
        """Pairs that an expert keeps of so many tokens, or None: all."""
        if self.capacity_factor == 0:
            return None
        return math.ceil(self.capacity_factor * num_tokens * self.top_k / self.num_experts)

    def _names(self) -> Iterator[str]:
        for field, allowed in (
            ("activation", ACTIVATIONS),
            ("precision", PRECISIONS),
            ("score", SCORES),
            ("rounding", ("none", *ROUNDINGS)),
            ("aux_loss", AUX_LOSSES),
            ("backend", BACKENDS),
        ):
            value = getattr(self, field)
            if value not in allowed:
                yield f"{field}={value!r} is unknown; allowed: {', '.join(allowed)}"
        if self.precision != "wide" and (self.activation != "swiglu" or self.expert_bias):
            yield (
                f"precision={self.precision!r} takes activation='swiglu' and expert_bias=False, got "
                f"{self.activation!r} and {self.expert_bias}"
            )
        for field in ("fp8_input_store", "wide_into_activation"):
            if getattr(self, field) and self.precision == "wide":
                yield f"{field} needs a precision of {', '.join(PRECISIONS[1:])}, got 'wide'"
        if self.fp8_input_store and self.wide_into_activation and self.precision != "wide":
            yield "fp8_input_store rounds what wide_into_activation keeps wide; leave out one of the two"

    def _sizes(self) -> Iterator[str]:
        for field in ("hidden_size", "num_experts", "top_k", "expert_hidden_size", "tile_rows", "top_groups"):
            if getattr(self, field) < 1:
                yield f"{field}={getattr(self, field)} must be at least 1"
        for field in (
            "shared_expert_hidden_size",
            "capacity_factor",
            "aux_loss_coeff",
            "z_loss_coeff",
            "init_std",
        ):
            if not getattr(self, field) >= 0:
                yield f"{field}={getattr(self, field)} must be 0 or more"
        if self.top_k > self.num_experts:
            yield f"top_k={self.top_k} is more than num_experts={self.num_experts}"
        if not 0 <= self.jitter < 1:
            yield f"jitter={self.jitter} must be in [0, 1)"
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            yield f"num_groups={self.num_groups} does not divide num_experts={self.num_experts}"
        elif not 1 <= self.top_groups <= self.num_groups:
            yield f"top_groups={self.top_groups} must be between 1 and num_groups={self.num_groups}"
        if self.score == "sigmoid" and not self.score_before_topk:
            yield "score='sigmoid' needs score_before_topk=True"
