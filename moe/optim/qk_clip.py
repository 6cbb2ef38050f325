"""QK-clip (Kimi K2, arXiv 2507.20534, section 2.1): heads with too large attention logits are scaled down.

Muon lets logits grow where AdamW does not. After an update, the queries and keys of each head whose largest
logit S of the step exceeds tau shrink by gamma = tau / S, in their weights and so for good; heads below it
are left alone.

Shapes: S query positions, T key positions, B batch, H heads of queries, G heads of keys, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.config.schema import AttentionSection

# Queries at once: bounds the memory of logits, which fused attention never holds.
_BLOCK = 256


class LargestLogits:
    """Of each head of one attention, over all passes with gradients since they were last taken."""

    def __init__(self) -> None:
        self._largest_H: Tensor | None = None

    def note(self, q_SBHd: Tensor, k_TBGd: Tensor, *, scale: float, window: int = 0) -> None:
        """Take account of a pass, unless it is without gradients; arguments as of `largest_logits`."""
        if torch.is_grad_enabled():
            found_H = largest_logits(q_SBHd, k_TBGd, scale=scale, window=window)
            before_H = self._largest_H
            self._largest_H = found_H if before_H is None else torch.maximum(before_H, found_H)

    def take(self) -> Tensor:
        """The largest logits [H], fp32; they are forgotten here."""
        assert self._largest_H is not None, "no forward pass with gradients since the last update"
        largest_H, self._largest_H = self._largest_H, None
        return largest_H


@torch.no_grad()
def largest_logits(q_SBHd: Tensor, k_TBGd: Tensor, *, scale: float, window: int = 0) -> Tensor:
    """The largest logit of each head, [H], fp32.

    Costs the products of causal attention's logits once more: of Kimi K2 at 4096 tokens 1.5 % of all FLOPs.

    Args:
        q_SBHd: queries, rotated.
        k_TBGd: keys, of which the queries' are the last S; each head is shared by H / G of queries.
        scale: of the logits.
        window: positions seen, the own included; 0 is all.
    """
    S, _, H, _ = q_SBHd.shape
    T, _, G, _ = k_TBGd.shape
    q_BGrSd = q_SBHd.unflatten(2, (G, H // G)).permute(1, 2, 3, 0, 4)
    k_BG1dT = k_TBGd.permute(1, 2, 3, 0).unsqueeze(2)
    places_S, places_T = torch.arange(T - S, T, device=q_SBHd.device), torch.arange(T, device=q_SBHd.device)
    largest_H = torch.full((H,), -torch.inf, device=q_SBHd.device)
    for first in range(0, S, _BLOCK):
        queries = slice(first, min(first + _BLOCK, S))
        keys = slice(max(0, T - S + first - window + 1) if window else 0, T - S + queries.stop)
        distance = places_S[queries, None] - places_T[None, keys]
        hidden = (distance < 0) | (distance >= (window or T))
        logits_BGrst = torch.matmul(q_BGrSd[..., queries, :], k_BG1dT[..., keys])
        found_Gr = logits_BGrst.masked_fill_(hidden, -torch.inf).amax(dim=(0, 3, 4))
        largest_H = torch.maximum(largest_H, found_Gr.flatten().float() * scale)
    return largest_H


def row_factors(name: str, gamma_H: Tensor, attention: AttentionSection) -> Tensor | None:
    """Factor of each row of a projection to heads; None if it has neither queries nor keys.

    A head's logits become gamma times what they were. Queries and keys share the factor where both are the
    head's own; where heads share a key (grouped queries, the rotated part of latent attention), its queries
    bear all of it.

    Args:
        name: Of the parameter.
        gamma_H: Of the heads whose rows this rank has.
        attention: Sizes.
    """
    root_H = gamma_H.sqrt()
    one_H = torch.ones_like(gamma_H)
    if name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
        shared = attention.num_heads // attention.query_groups
        gamma_Gr = (gamma_H if shared > 1 else root_H).unflatten(0, (-1, shared))
        key_G1 = (one_H if shared > 1 else root_H).unflatten(0, (-1, shared))[:, :1]
        heads = torch.cat([gamma_Gr, key_G1, torch.ones_like(key_G1)], dim=1)
        return heads.flatten().repeat_interleave(attention.head_dim)
    n, r, v = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim
    if name.endswith("linear_q_up.weight"):
        return torch.cat([root_H[:, None].expand(-1, n), gamma_H[:, None].expand(-1, r)], dim=1).flatten()
    if name.endswith("linear_kv_up.weight"):
        return torch.cat([root_H[:, None].expand(-1, n), one_H[:, None].expand(-1, v)], dim=1).flatten()
    return None
