"""Megatron layer specs from our own parts: RMSNorm, attention over torch SDPA, our MoE layer.

Megatron supplies what it is best at: tensor-parallel linears, embeddings, RoPE, the pipeline.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.post_training.modelopt.layers import Linear as ReplicatedLinear
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from moe.config.schema import ModelSection
from moe.model.moe_adapter import MoEAdapter


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) that works under sequence parallelism.

    Each tensor-parallel rank normalises its own positions, so the weight's gradient is partial: the mark
    `sequence_parallel` makes Megatron sum it over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SdpaAttention(nn.Module):
    """Causal attention over torch's scaled_dot_product_attention; grouped queries and MLA's wider keys work.

    Shapes: S sequence, B batch, H query heads of this rank, G key/value heads of this rank, d head size.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        if config.context_parallel_size != 1:
            raise ValueError(f"context_parallel_size={config.context_parallel_size} is not supported; use 1")
        self.softmax_scale = softmax_scale

    def forward(self, q_SBHd: Tensor, k_SBGd: Tensor, v_SBGd: Tensor, *_: Any, **__: Any) -> Tensor:
        """[S, B, H * d of the values]; the mask is causal whatever mask Megatron passes."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBHd, k_SBGd, v_SBGd))
        y_BHSd = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return y_BHSd.permute(2, 0, 1, 3).flatten(2)


def layer_spec(model: ModelSection, layer_index: int, moe_params: dict[str, Any]) -> ModuleSpec:
    """The spec of one transformer layer.

    Args:
        model: sizes.
        layer_index: from 0; the first `num_dense_layers` have a dense feed-forward.
        moe_params: what MoEAdapter takes beside Megatron's config.
    """
    dense = layer_index < model.num_dense_layers
    mlp = ModuleSpec(module=MLP, submodules=mlp_submodules()) if dense else moe_spec(moe_params)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=_mla_spec(model) if model.attention.kind == "mla" else _gqa_spec(),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def moe_spec(moe_params: dict[str, Any]) -> ModuleSpec:
    """Our MoE layer behind Megatron's feed-forward contract."""
    return ModuleSpec(module=MoEAdapter, submodules=mlp_submodules(), params=moe_params)


def mlp_submodules() -> MLPSubmodules:
    """Tensor-parallel linears of a feed-forward."""
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _gqa_spec() -> ModuleSpec:
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SdpaAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )


def _mla_spec(model: ModelSection) -> ModuleSpec:
    if multi_latent_attention.HAVE_TE and not isinstance(multi_latent_attention.TELinear, type):
        # megatron-core 0.16.1 believes that Transformer Engine is present whenever its own wrappers import,
        # and asks isinstance(layer, TELinear) of the mock that stands for the absent class.
        multi_latent_attention.HAVE_TE = False
    return ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            # Whole on every rank, each working on its own positions. Split over tp, as megatron-core 0.16.1's
            # own spec does without Transformer Engine, the gradient of the rotary key that all heads share
            # would hold the heads of one rank only.
            linear_q_down_proj=ReplicatedLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ReplicatedLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=SdpaAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm if model.attention.q_lora_rank else IdentityOp,
            kv_layernorm=RMSNorm,
        ),
    )
