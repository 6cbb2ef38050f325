"""Megatron layer specs from our own parts: RMSNorm, attention over torch SDPA, our MoE layer.

Megatron supplies what it is best at: tensor-parallel linears, embeddings, the pipeline.
"""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from moe.config.schema import ModelSection
from moe.model.grouped_attention import GroupedQueryAttention
from moe.model.latent_attention import LatentAttention
from moe.model.moe_adapter import MoEAdapter
from moe.model.norm import RMSNorm

# The transformer layer of a multi-token prediction module: megatron-core 0.16's name, or 0.19's.
_MTP_FIELDS = MultiTokenPredictionLayerSubmodules.__dataclass_fields__
MTP_LAYER = "transformer_layer" if "transformer_layer" in _MTP_FIELDS else "mtp_model_layer"


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
            self_attention=_attention_spec(model, layer_index),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def mtp_spec(model: ModelSection, moe_params: dict[str, Any]) -> ModuleSpec:
    """The modules that predict further tokens: each a projection of hidden state and embedding, and a layer.

    Arguments as of `layer_spec`.
    """
    layers = [
        ModuleSpec(
            module=MultiTokenPredictionLayer,
            submodules=MultiTokenPredictionLayerSubmodules(
                enorm=RMSNorm,
                hnorm=RMSNorm,
                eh_proj=ColumnParallelLinear,
                layer_norm=RMSNorm,
                **{MTP_LAYER: layer_spec(model, model.num_layers + index, moe_params)},
            ),
        )
        for index in range(model.mtp_layers)
    ]
    submodules = MultiTokenPredictionBlockSubmodules(layer_specs=layers)
    return ModuleSpec(module=MultiTokenPredictionBlock, submodules=submodules)


def moe_spec(moe_params: dict[str, Any]) -> ModuleSpec:
    """Our MoE layer behind Megatron's feed-forward contract."""
    return ModuleSpec(module=MoEAdapter, submodules=mlp_submodules(), params=moe_params)


def mlp_submodules() -> MLPSubmodules:
    """Tensor-parallel linears of a feed-forward."""
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _attention_spec(model: ModelSection, layer_index: int) -> ModuleSpec:
    mask = {"attn_mask_type": AttnMaskType.causal}  # Megatron's multi-token prediction asks for it
    if model.attention.kind == "mla":
        return ModuleSpec(module=LatentAttention, params={"attention": model.attention, **mask})
    params = {"attention": model.attention, "layer_index": layer_index, **mask}
    return ModuleSpec(module=GroupedQueryAttention, params=params)
