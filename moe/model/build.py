"""From the run's config to a Megatron GPTModel: a chunk of the pipeline that this rank holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from moe.config.schema import RunConfig
from moe.layer import NodeGroups
from moe.model.init import init_weights, mark_tensor_parallel
from moe.model.moe_adapter import MoEGroups
from moe.model.norm import RMSNorm
from moe.model.pipeline import layers_of_chunks, megatron_layout
from moe.model.recompute import recompute_settings
from moe.model.spec import layer_spec, mtp_spec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def sharded_state(model: GPTModel) -> dict[str, Any]:
    """Parameters as parts of whole ones; every layer has its own key, whatever the pipeline split."""
    metadata = {
        "non_homogeneous_layers": True,
        "singleton_local_shards": False,
        "dp_cp_group": model.pg_collection.dp_cp,
    }
    state: dict[str, Any] = model.sharded_state_dict(metadata=metadata)
    # Megatron's linears add an empty object each, the only pickles that would be among a checkpoint's shards.
    return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


def transformer_config(config: RunConfig) -> TransformerConfig:
    """Megatron's config for ours. Fusions that need Transformer Engine or Apex are off."""
    model, parallel, attention = config.model, config.parallel, config.model.attention
    dtype = DTYPES[config.train.precision]
    settings: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": attention.num_heads,
        "num_query_groups": attention.query_groups,
        "kv_channels": attention.head_dim,
        "num_moe_experts": model.num_experts,
        "moe_router_topk": model.top_k,
        "moe_ffn_hidden_size": model.expert_hidden_size,
        "moe_layer_freq": [int(i >= model.num_dense_layers) for i in range(model.num_layers)],
        "mtp_num_layers": model.mtp_layers or None,
        "mtp_loss_scaling_factor": model.mtp_loss_coeff,
        "layernorm_epsilon": model.norm_eps,
        "normalization": "RMSNorm",
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if parallel.vpp > 1 else None,
        # Chunks need it where the next stage is also the one before: batched transfers of two stages mix up.
        "overlap_p2p_comm": parallel.vpp > 1,
        "batch_p2p_comm": parallel.vpp == 1,
        "pipeline_model_parallel_layout": megatron_layout(model, parallel) if parallel.pp > 1 else None,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp,
        "context_parallel_size": parallel.cp,
        "sequence_parallel": parallel.tp > 1,  # Megatron demands it of MoE with tensor parallelism
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "use_cpu_initialization": True,
        "perform_initialization": False,  # init_weights does it
        **recompute_settings(config.train.recompute),
    }
    return TransformerConfig(**settings)


def build_model(
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    num_microbatches: int,
    chunk: int = 0,
    nodes: NodeGroups | None = None,
) -> GPTModel:
    """A chunk of this rank, initialised, on the CPU; arguments as of `assemble_model`."""
    model = assemble_model(config, groups, num_microbatches=num_microbatches, chunk=chunk, nodes=nodes)
    init_weights(
        sharded_state(model),
        seed=config.run.seed,
        std=config.model.init_std,
        num_layers=config.model.num_layers,
    )
    return model


def load_weights(model: GPTModel, directory: Path) -> None:
    """Fill a model from a checkpoint's shards, written in whatever layout and precision; collective.

    Args:
        model: any rank's chunk; its router biases are filled, too.
        directory: a folder that was verified.
    """
    loaded = dist_checkpointing.load({"model": sharded_state(model)}, str(directory))
    model.load_state_dict(loaded["model"])


def assemble_model(
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    num_microbatches: int,
    chunk: int = 0,
    nodes: NodeGroups | None = None,
) -> GPTModel:
    """A chunk of this rank with memory for its weights, on torch's default device (meta needs none).

    Args:
        config: the run's.
        groups: Megatron's process groups.
        num_microbatches: in a step; the router losses are divided by it.
        chunk: index among the rank's parallel.vpp chunks.
        nodes: what `moe.model.moe_adapter.node_groups` made; None is the plain all-to-all.
    """
    parallel, megatron_config = config.parallel, transformer_config(config)
    place = chunk * parallel.pp + groups.pp.rank()  # in the order of the model
    is_last = place == parallel.pp * parallel.vpp - 1
    moe_params = {
        "model": config.model,
        "groups": MoEGroups.of(groups, nodes),
        "num_microbatches": num_microbatches,
        "kernels": config.engine.kernels,
        "overlap": parallel.overlap_shared_expert,
    }
    layers = layers_of_chunks(config.model, parallel)
    first = sum(layers[:place])
    specs = [layer_spec(config.model, index, moe_params) for index in range(first, first + layers[place])]
    model = GPTModel(
        megatron_config,
        TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm),
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.data.seq_length,
        position_embedding_type="none",  # our attentions rotate by themselves
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        pre_process=place == 0,
        post_process=is_last,
        mtp_block_spec=mtp_spec(config.model, moe_params) if is_last and config.model.mtp_layers else None,
        pg_collection=groups,
        vp_stage=chunk if parallel.vpp > 1 else None,
    )
    mark_tensor_parallel(model)
    return model
