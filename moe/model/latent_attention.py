"""Multi-head latent attention (arXiv 2405.04434, section 2.1) for tensor and sequence parallelism.

Our own, because megatron-core's needs Transformer Engine: without it, 0.16.1 leaves the gradient of the key
part that all heads share to the heads of one rank, and 0.19 does not build.

Shapes: S positions of a sequence, C those of this context-parallel rank (S / cp), s those of this rank
(C / tp), B batch, D model, H heads, h heads of this rank; n, r the parts of a query-key head without and with
rotation, d = n + r, v value head, q and c compressed sizes of queries and of keys and values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe.config.schema import AttentionSection
from moe.model.context_parallel import SequenceSplit
from moe.model.norm import ReplicatedLinear, RMSNorm
from moe.model.recompute import recomputed
from moe.model.rope import inverse_frequencies, rotate_pairs


class LatentAttention(MegatronModule):
    """Keys and values from a compressed representation, queries too if asked; one rotary key for all heads.

    The compressions are small and whole on every rank; the projections to heads are split over tp. Under
    context parallelism the compressed keys and values travel, each rank projects those of all positions.
    """

    frequencies: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        attention: AttentionSection,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.sizes = attention
        self.tp_group = pg_collection.tp
        self.split = SequenceSplit(pg_collection.cp, pg_collection.tp)
        H, D = attention.num_heads, config.hidden_size
        qk_head_dim = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        column = {
            "config": config,
            "init_method": config.init_method,
            "bias": False,
            "tp_group": self.tp_group,
        }
        self.logit_scale = attention.yarn.softmax_scale / math.sqrt(qk_head_dim)
        self.register_buffer(
            "frequencies", inverse_frequencies(attention, attention.qk_rope_head_dim), persistent=False
        )
        self.linear_q_down: ReplicatedLinear | None = None
        if attention.q_lora_rank:
            self.linear_q_down = ReplicatedLinear(config, D, attention.q_lora_rank)
            self.q_layernorm = RMSNorm(config, attention.q_lora_rank, config.layernorm_epsilon)
        self.linear_q_up = ColumnParallelLinear(
            attention.q_lora_rank or D, H * qk_head_dim, gather_output=False, **column
        )
        self.linear_kv_down = ReplicatedLinear(config, D, attention.kv_lora_rank + attention.qk_rope_head_dim)
        self.kv_layernorm = RMSNorm(config, attention.kv_lora_rank, config.layernorm_epsilon)
        self.linear_kv_up = ColumnParallelLinear(
            attention.kv_lora_rank,
            H * (attention.qk_nope_head_dim + attention.v_head_dim),
            gather_output=False,
            **column,
        )
        self.linear_proj = RowParallelLinear(
            H * attention.v_head_dim, D, input_is_parallel=True, skip_bias_add=True, **column
        )

    def forward(self, x_sBD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """(output of the shape of x, no bias); causal whatever mask Megatron passes."""
        q_sBq = x_sBD if self.linear_q_down is None else self.linear_q_down(x_sBD)
        kv_sBc = self.linear_kv_down(x_sBD)
        y_CBw = recomputed(self.config, self._attend, q_sBq, kv_sBc, again=self.split.logits_known)
        output, _ = self.linear_proj(y_CBw)
        return output, None

    def _attend(self, q_sBq: Tensor, kv_sBc: Tensor) -> Tensor:
        """All between the compressions and the output projection: norms, up-projections, attention."""
        n, r, v = self.sizes.qk_nope_head_dim, self.sizes.qk_rope_head_dim, self.sizes.v_head_dim
        if self.linear_q_down is not None:
            q_sBq = self.q_layernorm(q_sBq)
        q_CBhd, _ = self.linear_q_up(q_sBq)
        q_nope_CBhn, q_rope_CBhr = q_CBhd.unflatten(-1, (-1, n + r)).split([n, r], dim=-1)
        positions_C = self.split.positions(q_CBhd.shape[0], q_CBhd.device)
        q_CBhd = torch.cat([q_nope_CBhn, self._rotate(q_rope_CBhr, positions_C)], dim=-1)

        c_sBc, k_rope_sBr = self.split.gather(kv_sBc).split([self.sizes.kv_lora_rank, r], dim=-1)
        kv_SBhd, _ = self.linear_kv_up(self.kv_layernorm(c_sBc))
        if self.config.sequence_parallel:
            # All positions forward; backward the sum over the heads of all ranks.
            k_rope_sBr = gather_from_sequence_parallel_region(k_rope_sBr, group=self.tp_group)
        kv_SBhd, k_rope_SBr = (self.split.in_order(x, gathered_before_tp=True) for x in (kv_SBhd, k_rope_sBr))
        k_nope_SBhn, v_SBhv = kv_SBhd.unflatten(-1, (-1, n + v)).split([n, v], dim=-1)
        k_rope_SB1r = self._rotate(k_rope_SBr.unsqueeze(2), None)
        k_SBhd = torch.cat([k_nope_SBhn, k_rope_SB1r.expand(*k_nope_SBhn.shape[:3], r)], dim=-1)
        return self.split.attend(q_CBhd, k_SBhd, v_SBhv, scale=self.logit_scale)

    def _rotate(self, x_SBHr: Tensor, positions_S: Tensor | None) -> Tensor:
        return rotate_pairs(x_SBHr, self.frequencies, positions_S, scale=self.sizes.yarn.rotation_scale)
