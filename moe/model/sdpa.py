"""Causal attention over torch's scaled_dot_product_attention; grouped queries and unequal head sizes work."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def causal_attention(q_SBHd: Tensor, k_SBGd: Tensor, v_SBGv: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of every position to itself and those before it.

    Args:
        q_SBHd: S positions, B sequences, H heads of size d.
        k_SBGd: G heads, each shared by H / G queries.
        v_SBGv: heads of size v.
        scale: of the logits; None is 1 / sqrt(d).

    Returns:
        [S, B, H * v].
    """
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBHd, k_SBGd, v_SBGv))
    y_BHSv = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y_BHSv.permute(2, 0, 1, 3).flatten(2)


class SdpaAttention(nn.Module):
    """`causal_attention` as the core attention of Megatron's SelfAttention."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        if config.context_parallel_size != 1:
            raise ValueError(f"context_parallel_size={config.context_parallel_size} is not supported; use 1")
        self.softmax_scale = softmax_scale

    def forward(self, q_SBHd: Tensor, k_SBGd: Tensor, v_SBGd: Tensor, *_: Any, **__: Any) -> Tensor:
        """[S, B, H * d of the values]; the mask is causal whatever mask Megatron passes."""
        return causal_attention(q_SBHd, k_SBGd, v_SBGd, scale=self.softmax_scale)
