"""The Mixture-of-Experts layer: four stages that read in one direction.

1. route     x -> expert ids and weights        router.py
2. dispatch  rows to the ranks of their experts dispatch.py
3. compute   each expert, weighted              experts.py
4. combine   sum back at each token             dispatch.py
plus the shared expert, and the router losses, which are returned.

Shapes: S sequence, B batch, T = S*B tokens on this rank, D model.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.layer.balance import router_losses
from moe.layer.config import MoEConfig
from moe.layer.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher
from moe.layer.dispatch_expert_tensor import ExpertTensorDispatcher
from moe.layer.dispatch_hierarchical import HierarchicalDispatcher, NodeGroups
from moe.layer.experts import GroupedExperts
from moe.layer.router import Router
from moe.layer.shared_expert import SharedExpert
from moe.layer.types import MoEOutput


class MoELayer(nn.Module):
    """A sparse Mixture-of-Experts feed-forward, dropless unless the config says otherwise.

    A plain module: it works under torch.compile, DDP, FSDP2, DeepSpeed and Megatron, and builds on `meta`.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        shared_expert: nn.Module | None = None,
        ep_group: dist.ProcessGroup | None = None,
        etp_group: dist.ProcessGroup | None = None,
        nodes: NodeGroups | None = None,
        overlap: bool = False,
        sequence_group: dist.ProcessGroup | None = None,
        balance_group: dist.ProcessGroup | None = None,
        initialize: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Build the stages.

        Args:
            config: sizes and settings.
            shared_expert: any module from tokens to outputs of their shape, in place of the config's own.
            ep_group: the ranks that share the experts, each holding E / ranks; None means all are here.
            etp_group: the ranks that split each expert along its hidden size; None means they are whole. They
                must bring different tokens, as those of ep_group: one that two of them bring is two tokens.
            nodes: ep_group by node; rows then cross the network once for each node, not each expert.
            overlap: compute the shared expert while rows travel to experts; changes no bit of any result.
            sequence_group: the ranks that hold the other positions of the same sequences.
            balance_group: the ranks whose tokens count for aux_loss='global'; None means this one only.
            initialize: draw the weights; False leaves them to whoever loads them.
            dtype: of the experts; the router stays in fp32.
            device: of everything.

        Raises:
            ValueError: if the experts cannot be split over ep_group, or each over etp_group; nodes without
                ep_group.
        """
        super().__init__()
        if nodes is not None and ep_group is None:
            raise ValueError("nodes are those of ep_group, which is None; give both, or neither")
        self.config = config
        self.overlap = overlap
        self.sequence_group = sequence_group
        self.balance_group = balance_group
        ranks = 1 if ep_group is None else dist.get_world_size(ep_group)
        if config.num_experts % ranks:
            raise ValueError(
                f"{config.num_experts} experts cannot be split over {ranks} expert-parallel ranks"
            )
        self.router = Router(config, device=device)
        slices, slice_here = (1, 0) if etp_group is None else (etp_group.size(), etp_group.rank())
        self.experts = GroupedExperts(
            config,
            config.num_experts // ranks,
            slices=slices,
            slice_here=slice_here,
            dtype=dtype,
            device=device,
        )
        self.shared_expert = shared_expert
        if shared_expert is None and config.shared_expert_hidden_size:
            self.shared_expert = SharedExpert(
                config.hidden_size, config.shared_expert_hidden_size, dtype=dtype, device=device
            )
        self.dispatcher: Dispatcher
        if ep_group is None or ranks == 1:
            self.dispatcher = LocalDispatcher(config.num_experts, backend=config.backend)
        elif nodes is not None:
            self.dispatcher = HierarchicalDispatcher(config.num_experts, nodes, backend=config.backend)
        else:
            self.dispatcher = AllToAllDispatcher(config.num_experts, ep_group, backend=config.backend)
        if etp_group is not None and slices > 1:
            self.dispatcher = ExpertTensorDispatcher(self.dispatcher, etp_group, backend=config.backend)
        ep_rank = 0 if ep_group is None else dist.get_rank(ep_group)
        self._place = ep_rank * slices + slice_here
        if initialize and not self.router.weight_ED.is_meta:
            self.reset_parameters()

    def reset_parameters(self, place: int | None = None) -> None:
        """Draw the weights anew, also for the first time after a build on `meta`.

        Args:
            place: of this rank among those that share the experts, by default its own: they draw different
                ones from one seed.
        """
        std = self.config.init_std
        self.router.reset_parameters(std)
        if isinstance(self.shared_expert, SharedExpert):
            self.shared_expert.reset_parameters(std)
        seed = int(torch.randint(2**62, ())) + (self._place if place is None else place)
        self.experts.reset_parameters(std, seed=seed)

    def forward(self, x: Tensor) -> MoEOutput:
        """Route, dispatch, compute, combine.

        Args:
            x: [S, B, D], or [B, S, D] if the config says batch_first.

        Raises:
            ValueError: x has another shape.
        """
        if x.dim() != 3 or x.shape[2] != self.config.hidden_size:
            axes = "batch, sequence" if self.config.batch_first else "sequence, batch"
            raise ValueError(
                f"x must be [{axes}, hidden_size={self.config.hidden_size}], it is {list(x.shape)}"
            )
        x_SBD = x.transpose(0, 1) if self.config.batch_first else x
        x_TD = x_SBD.flatten(0, 1)
        balance = self.config.balance
        routing = self.router(x_TD, num_sequences=balance.num_sequences(x_SBD.shape[1]))
        arrive = self.dispatcher.start(x_TD, routing)
        shared = None
        if self.shared_expert is not None and self.overlap:
            shared = self.shared_expert(x)
        dispatched = arrive()
        y_RD = self.experts(dispatched.x_RD, dispatched)
        y = self.dispatcher.combine(y_RD, dispatched).view(x_SBD.shape)
        if self.config.batch_first:
            y = y.transpose(0, 1)
        if self.shared_expert is not None:
            y = y + (self.shared_expert(x) if shared is None else shared)
        losses = router_losses(
            routing, balance, sequence_group=self.sequence_group, balance_group=self.balance_group
        )
        weight_sum = routing.weights_TK.detach().sum()
        return MoEOutput(y, losses, routing.counts_E, routing.num_dropped, weight_sum)
