"""The Mixture-of-Experts layer: four stages that read in one direction.

1. route     x -> expert ids and weights        router.py
2. dispatch  rows to the ranks of their experts dispatch.py
3. compute   SwiGLU of each expert, weighted    experts.py
4. combine   sum back at each token             dispatch.py
plus the shared expert, and the router losses, which are returned.

Shapes: S sequence, B batch, T = S*B tokens on this rank, D model.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.layer.balance import BalanceSettings, router_losses
from moe.layer.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher
from moe.layer.experts import GroupedExperts
from moe.layer.router import Router
from moe.layer.types import MoEOutput


class MoELayer(nn.Module):
    """A dropless sparse Mixture-of-Experts feed-forward. Builds on any device, `meta` included."""

    def __init__(
        self,
        router: Router,
        experts: GroupedExperts,
        *,
        shared_expert: nn.Module | None = None,
        balance: BalanceSettings | None = None,
        ep_group: dist.ProcessGroup | None = None,
        sequence_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Put the stages together.

        Args:
            router: chooses among all E experts; the dispatcher takes its kernel backend.
            experts: those that this rank holds, E / ranks of ep_group.
            shared_expert: any module [S, B, D] -> [S, B, D]; its output is added.
            balance: the router losses; None gives none.
            ep_group: the ranks that share the experts; None means all are here.
            sequence_group: the ranks that hold the other positions of the same sequences.

        Raises:
            ValueError: if the number of local experts does not fit the group.
        """
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared_expert = shared_expert
        self.balance = balance or BalanceSettings(aux_loss="none")
        self.sequence_group = sequence_group
        num_experts = router.weight_ED.shape[0]
        alone = ep_group is None or dist.get_world_size(ep_group) == 1
        ranks = 1 if alone else dist.get_world_size(ep_group)
        if experts.w_down_eDF.shape[0] * ranks != num_experts:
            raise ValueError(
                f"{experts.w_down_eDF.shape[0]} local experts on {ranks} ranks "
                f"are not the router's {num_experts}"
            )
        self.dispatcher: Dispatcher
        if ep_group is None or alone:
            self.dispatcher = LocalDispatcher(num_experts, backend=router.backend)
        else:
            self.dispatcher = AllToAllDispatcher(num_experts, ep_group, backend=router.backend)

    def forward(self, x_SBD: Tensor) -> MoEOutput:
        """Route, dispatch, compute, combine."""
        x_TD = x_SBD.flatten(0, 1)
        routing = self.router(x_TD, num_sequences=self.balance.num_sequences(x_SBD.shape[1]))
        dispatched = self.dispatcher.dispatch(x_TD, routing)
        y_RD = self.experts(dispatched)
        y_SBD = self.dispatcher.combine(y_RD, dispatched).view_as(x_SBD)
        if self.shared_expert is not None:
            y_SBD = y_SBD + self.shared_expert(x_SBD)
        losses = router_losses(routing, self.balance, sequence_group=self.sequence_group)
        return MoEOutput(y_SBD, losses, routing.counts_E)


def build_moe_layer(
    hidden_size: int,
    num_experts: int,
    top_k: int,
    expert_hidden_size: int,
    *,
    shared_expert: nn.Module | None = None,
    balance: BalanceSettings | None = None,
    ep_group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    score: str = "softmax",
    score_before_topk: bool = True,
    renormalize: bool = False,
    scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
    rounding: str = "none",
    tile_rows: int = 128,
    backend: str = "auto",
) -> MoELayer:
    """A MoELayer from its sizes; weights are uninitialised (call reset_parameters of its parts, or load).

    Raises:
        ValueError: if the experts cannot be split over ep_group.
    """
    ranks = 1 if ep_group is None else dist.get_world_size(ep_group)
    if num_experts % ranks:
        raise ValueError(f"{num_experts} experts cannot be split over {ranks} expert-parallel ranks")
    router = Router(
        hidden_size,
        num_experts,
        top_k,
        score=score,
        score_before_topk=score_before_topk,
        renormalize=renormalize,
        scale=scale,
        num_groups=num_groups,
        top_groups=top_groups,
        rounding=rounding,
        tile_rows=tile_rows,
        backend=backend,
        device=device,
    )
    experts = GroupedExperts(
        num_experts // ranks,
        hidden_size,
        expert_hidden_size,
        backend=backend,
        dtype=dtype,
        device=device,
    )
    return MoELayer(
        router,
        experts,
        shared_expert=shared_expert,
        balance=balance,
        ep_group=ep_group,
        sequence_group=sequence_group,
    )
