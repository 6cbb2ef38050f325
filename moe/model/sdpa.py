"""Causal attention over torch's scaled_dot_product_attention; grouped queries and unequal head sizes work."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def causal_attention(
    q_SBHd: Tensor,
    k_TBGd: Tensor,
    v_TBGv: Tensor,
    *,
    scale: float | None = None,
    window: int = 0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of every position to itself and those before it.

    A window or sinks need a mask of S * T logits a head, which costs torch's fastest kernels.

    Args:
        q_SBHd: S positions, B sequences, H heads of size d.
        k_TBGd: T positions, of which the queries' are the last S; G heads, each shared by H / G queries.
        v_TBGv: heads of size v.
        scale: of the logits; None is 1 / sqrt(d).
        window: positions seen, the own included; 0 is all.
        sinks_H: a logit for each head beside those of the keys, whose share of the softmax is lost.

    Returns:
        [S, B, H * v].
    """
    S, T = q_SBHd.shape[0], k_TBGd.shape[0]
    mask: Tensor | None
    if window == 0 and sinks_H is None:
        mask = None if S == T else causal_lower_right(S, T)
    else:
        mask = _mask_HST(q_SBHd, T, window, sinks_H)
    if sinks_H is not None:  # as the logit of one more key, whose value is nothing
        k_TBGd, v_TBGv = (F.pad(t, (0, 0, 0, 0, 0, 0, 0, 1)) for t in (k_TBGd, v_TBGv))
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBHd, k_TBGd, v_TBGv))
    y_BHSv = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y_BHSv.permute(2, 0, 1, 3).flatten(2)


def _mask_HST(q_SBHd: Tensor, T: int, window: int, sinks_H: Tensor | None) -> Tensor:
    """What is added to the logits: [1 or H, S, keys], the sink as the last key."""
    S, device = q_SBHd.shape[0], q_SBHd.device
    distance_ST = torch.arange(T - S, T, device=device)[:, None] - torch.arange(T, device=device)[None, :]
    hidden_ST = (distance_ST < 0) | (distance_ST >= (window or T))
    mask_1ST = torch.zeros(1, S, T, device=device, dtype=q_SBHd.dtype)
    mask_1ST.masked_fill_(hidden_ST, -torch.inf)
    if sinks_H is None:
        return mask_1ST
    H = sinks_H.numel()
    sinks_HS1 = sinks_H.to(q_SBHd.dtype)[:, None, None].expand(H, S, 1)
    return torch.cat([mask_1ST.expand(H, S, T), sinks_HS1], dim=-1)
