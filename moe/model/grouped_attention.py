"""Grouped-query attention (arXiv 2305.13245) for tensor and sequence parallelism.

Our own around Megatron's linears, for what published models add to it: norms of queries and keys in each head
or over all heads, biases of either projection alone, rotation of a part of each head, YaRN, windows, sinks.

Shapes: S positions of a sequence, C those of this context-parallel rank (S / cp), s those of this rank
(C / tp), B batch, D model, H query heads, G key/value heads, h and g those of this rank, d head size.
"""

from __future__ import annotations

import math
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe.config.schema import AttentionSection
from moe.model.context_parallel import SequenceSplit
from moe.model.norm import AllHeadsNorm, HeadVector, RMSNorm
from moe.model.recompute import recomputed
from moe.model.rope import inverse_frequencies, rotate_halves


class GroupedQueryAttention(MegatronModule):
    """Heads are split over tp. The fused projection holds, group by group, queries, key and value."""

    frequencies: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        attention: AttentionSection,
        layer_index: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.sizes = attention
        self.window = window_of(attention, layer_index)
        self.logit_scale = attention.yarn.softmax_scale / math.sqrt(attention.head_dim)
        self.tp_group = pg_collection.tp
        self.split = SequenceSplit(pg_collection.cp, pg_collection.tp)
        H, G, d = attention.num_heads, attention.query_groups, attention.head_dim
        linear = {"config": config, "init_method": config.init_method, "tp_group": self.tp_group}
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size, (H + 2 * G) * d, bias=attention.qkv_bias, gather_output=False, **linear
        )
        self.linear_proj = RowParallelLinear(
            H * d,
            config.hidden_size,
            bias=attention.output_bias,
            input_is_parallel=True,
            skip_bias_add=True,
            **linear,
        )
        self.q_layernorm = self._norm(H)
        self.k_layernorm = self._norm(G)
        self.sinks = HeadVector(config, H, self.tp_group) if attention.sinks else None
        frequencies = inverse_frequencies(attention, attention.rotary_dim or d)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def _norm(self, heads: int) -> nn.Module:
        """Of queries or keys [C, B, heads, d]."""
        d, eps = self.sizes.head_dim, self.config.layernorm_epsilon
        if self.sizes.qk_norm == "head":
            return RMSNorm(self.config, d, eps)
        if self.sizes.qk_norm == "full":
            return AllHeadsNorm(self.config, heads * d, eps, self.tp_group)
        return nn.Identity()

    def forward(self, x_sBD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """(output of the shape of x, its bias or None); causal whatever mask Megatron passes."""
        qkv_CBw, _bias = self.linear_qkv(x_sBD)
        y_CBw = recomputed(self.config, self._attend, qkv_CBw, again=self.split.logits_known)
        output, bias = self.linear_proj(y_CBw)
        return output, bias

    def _attend(self, qkv_CBw: Tensor) -> Tensor:
        """All between the two projections."""
        queries_per_group = self.sizes.num_heads // self.sizes.query_groups
        qkv_CBgnd = qkv_CBw.unflatten(-1, (-1, queries_per_group + 2, self.sizes.head_dim))
        q_CBgnd, k_CBg1d, v_CBg1d = qkv_CBgnd.split([queries_per_group, 1, 1], dim=3)
        positions_C = self.split.positions(qkv_CBw.shape[0], qkv_CBw.device)
        q_CBhd, k_CBgd = (
            rotate_halves(x, self.frequencies, positions_C, scale=self.sizes.yarn.rotation_scale)
            for x in (self.q_layernorm(q_CBgnd.flatten(2, 3)), self.k_layernorm(k_CBg1d.squeeze(3)))
        )
        k_SBgd, v_SBgd = (self.split.in_order(self.split.gather(x)) for x in (k_CBgd, v_CBg1d.squeeze(3)))
        return self.split.attend(
            q_CBhd,
            k_SBgd,
            v_SBgd,
            scale=self.logit_scale,
            window=self.window,
            sinks_H=None if self.sinks is None else self.sinks(),
        )


def window_of(attention: AttentionSection, layer_index: int) -> int:
    """Positions that a layer (from 0) sees, its own included; 0 is all before."""
    every = attention.full_attention_every
    return 0 if every and (layer_index + 1) % every == 0 else attention.sliding_window
