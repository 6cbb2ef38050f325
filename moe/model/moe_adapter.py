"""Our MoE layer behind the contract of a Megatron feed-forward.

Megatron gives hidden states [S, B, D] (S divided by tp under sequence parallelism) and takes (output, bias).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe.config.schema import ModelSection, RunConfig
from moe.errors import InputError
from moe.layer import MoEConfig, MoELayer, NodeGroups, attach_loss, split_by_node
from moe.model.expert_shards import SPLIT_DIM, expert_shards
from moe.model.recompute import is_counted
from moe.ranks import on_every_rank, ranks_on_this_machine


@dataclass(frozen=True)
class MoEGroups:
    """The process groups that the layer communicates in or is replicated over."""

    ep: dist.ProcessGroup
    etp: dist.ProcessGroup  # ranks that split the same experts
    tp: dist.ProcessGroup
    dp: dist.ProcessGroup  # data (and context) parallel ranks: replicas of the router
    expert_dp: dist.ProcessGroup  # ranks that hold the same experts, or the same parts of them
    sequence: dist.ProcessGroup  # tensor- and context-parallel ranks: the other positions of the sequences
    cp: dist.ProcessGroup
    nodes: NodeGroups | None  # those of ep by node, for the hierarchical dispatcher

    @classmethod
    def of(cls, groups: ProcessGroupCollection, nodes: NodeGroups | None) -> MoEGroups:
        """Megatron's, and those of `node_groups`."""
        return cls(
            ep=groups.ep,
            etp=groups.expt_tp,
            tp=groups.tp,
            dp=groups.dp_cp,
            expert_dp=groups.expt_dp,
            sequence=groups.tp_cp,
            cp=groups.cp,
            nodes=nodes,
        )


def node_groups(ep: dist.ProcessGroup, config: RunConfig) -> NodeGroups | None:
    """The groups of the hierarchical dispatcher, where it is chosen; collective, once for all chunks.

    Raises:
        InputError: if the expert-parallel ranks are not whole nodes, as the dispatcher needs, or machines
            have unlike numbers of ranks and the config does not say how many a node has.
    """
    parallel = config.parallel
    if parallel.dispatcher != "hierarchical":
        return None
    per_node = parallel.ranks_per_node or _ranks_on_each_machine()
    of_ep, rest = divmod(per_node, parallel.etp)  # of neighbours that split the same experts ep has one
    try:
        if rest:
            raise ValueError(
                f"parallel.etp={parallel.etp} does not divide a node's ranks; use the plain all-to-all"
            )
        return split_by_node(ep, of_ep, timeout_s=config.engine.timeout_s)
    except ValueError as error:
        raise InputError(
            f"parallel.dispatcher=hierarchical: {error}, parallel.dispatcher=alltoall. "
            f"parallel.ranks_per_node={parallel.ranks_per_node}, {ranks_on_this_machine()} were started here"
        ) from error


def _ranks_on_each_machine() -> int:
    """The same on every rank, or groups would not fit together; collective."""
    numbers = on_every_rank(ranks_on_this_machine)
    if len(set(numbers)) == 1:
        return numbers[0]
    error = InputError(
        "parallel.dispatcher=hierarchical with parallel.ranks_per_node=0 needs as many ranks on every "
        f"machine, but ranks 0 to {len(numbers) - 1} have {', '.join(map(str, numbers))} on theirs; set "
        "parallel.ranks_per_node, or use parallel.dispatcher=alltoall"
    )
    error.on_all_ranks = True
    raise error


class SharedExpertMLP(nn.Module):
    """Megatron's tensor-parallel SwiGLU feed-forward as a shared expert."""

    def __init__(
        self, config: TransformerConfig, submodules: MLPSubmodules, hidden_size: int, tp: dist.ProcessGroup
    ) -> None:
        super().__init__()
        sized = copy.copy(config)  # the second linear takes its size from the config, not from the argument
        sized.ffn_hidden_size = hidden_size
        self.mlp = MLP(sized, submodules, ffn_hidden_size=hidden_size, tp_group=tp)

    def forward(self, x_SBD: Tensor) -> Tensor:
        """The output without Megatron's separate bias, which we do not use."""
        output, _ = self.mlp(x_SBD)
        y_SBD: Tensor = output
        return y_SBD


def layer_config(model: ModelSection, kernels: str) -> MoEConfig:
    """The layer that a run's config describes.

    Args:
        model: sizes and router settings; the shared expert is Megatron's, so the layer has none of its own.
        kernels: backend of the kernels, `auto`, `torch` or `triton`.
    """
    router = model.router
    return MoEConfig(
        hidden_size=model.hidden_size,
        num_experts=model.num_experts,
        top_k=model.top_k,
        expert_hidden_size=model.expert_hidden_size,
        activation=model.expert_activation,
        expert_bias=model.expert_bias,
        precision=model.expert_precision,
        fp8_input_store=model.expert_fp8_input_store,
        wide_into_activation=model.expert_wide_into_activation,
        score=router.score,
        score_before_topk=router.score_before_topk,
        renormalize=router.renormalize,
        scale=router.scale,
        num_groups=router.num_groups,
        top_groups=router.top_groups,
        logit_bias=router.logit_bias,
        jitter=router.jitter,
        capacity_factor=router.capacity_factor,
        rounding=router.rounding,
        tile_rows=router.tile_rows,
        aux_loss=router.aux_loss,
        aux_loss_coeff=router.aux_loss_coeff,
        z_loss_coeff=router.z_loss_coeff,
        backend=kernels,
    )


class MoEAdapter(MegatronModule):
    """Builds the layer from the config, attaches its losses, counts expert loads, shards its checkpoint."""

    tokens_per_expert_E: Tensor
    losses_2: Tensor
    weight_sum: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        model: ModelSection,
        groups: MoEGroups,
        num_microbatches: int,
        kernels: str,
        overlap: bool = False,
        **_: Any,
    ) -> None:
        """Build the layer.

        Args:
            config: Megatron's.
            submodules: linears of the shared expert.
            model: sizes and router settings.
            groups: process groups.
            num_microbatches: the router losses are divided by it, as the schedule divides the main loss.
            kernels: backend of the kernels, `auto`, `torch` or `triton`.
            overlap: compute the shared expert while rows travel.
        """
        super().__init__(config)
        self.groups = groups
        self.num_microbatches = num_microbatches
        shared = None
        if model.shared_expert_hidden_size:
            shared = SharedExpertMLP(config, submodules, model.shared_expert_hidden_size, groups.tp)
        self.layer = MoELayer(
            layer_config(model, kernels),
            shared_expert=shared,
            ep_group=groups.ep,
            etp_group=groups.etp,
            nodes=groups.nodes,
            overlap=overlap,
            sequence_group=groups.sequence if groups.sequence.size() > 1 else None,
            balance_group=groups.dp,
            initialize=False,
            dtype=config.params_dtype,
        )
        self._mark_parameters()
        self.register_buffer(
            "tokens_per_expert_E", torch.zeros(model.num_experts, dtype=torch.int64), persistent=False
        )
        self.register_buffer("losses_2", torch.zeros(2), persistent=False)
        self.register_buffer("weight_sum", torch.zeros(()), persistent=False)

    def _mark_parameters(self) -> None:
        for name, weight in self.layer.experts.named_parameters():
            # Reduced over the ranks that hold the same experts, never over plain data parallelism; and no
            # rank's copy is a tensor-parallel duplicate, so that the gradient norm counts every expert.
            weight.allreduce = False  # type: ignore[attr-defined]
            split_dim = SPLIT_DIM[name] if self.groups.etp.size() > 1 else 0
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=split_dim, stride=1)
        for weight in self.layer.router.parameters():
            weight.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def reset_step(self) -> None:
        """Forget what the last step counted."""
        for counted in (self.tokens_per_expert_E, self.losses_2, self.weight_sum):
            counted.zero_()

    def forward(self, hidden_SBD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """(output, no bias); the router losses ride on the output."""
        output = self.layer(hidden_SBD)
        if not self.training:
            return output.y, None
        if is_counted(self.config):
            self.tokens_per_expert_E += output.counts_E
            self.weight_sum += output.weight_sum
            self.losses_2 += (
                torch.stack([output.losses.balance, output.losses.z]).detach() / self.num_microbatches
            )
        # Each rank's share of the loss: Megatron averages gradients over context-parallel ranks, too.
        share = output.losses.total * self.groups.cp.size()
        return attach_loss(output.y, share / self.num_microbatches), None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Experts sharded over ep and etp and replicated over expert_dp; the router over tp and dp."""
        layer, groups = self.layer, self.groups
        axis = len(sharded_offsets)
        sharded = expert_shards(
            dict(layer.experts.named_parameters()),
            f"{prefix}layer.experts.",
            sharded_offsets,
            ep=groups.ep,
            etp=groups.etp,
            expert_dp=groups.expert_dp,
        )
        replica = (0, dist.get_rank(groups.tp), dist.get_rank(groups.dp))
        for name, tensor in layer.router.state_dict(keep_vars=True).items():
            key = f"{prefix}layer.router.{name}"
            sharded[key] = ShardedTensor.from_rank_offsets(
                key, tensor, *sharded_offsets, replica_id=replica, prepend_axis_num=axis
            )
        if isinstance(layer.shared_expert, SharedExpertMLP):
            shared_prefix = f"{prefix}layer.shared_expert.mlp."
            sharded |= layer.shared_expert.mlp.sharded_state_dict(shared_prefix, sharded_offsets, metadata)
        return sharded
