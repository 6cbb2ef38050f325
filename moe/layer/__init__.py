"""The MoE layer in plain PyTorch and our kernels; no engine is imported."""

from moe.layer.balance import BalanceSettings, attach_loss, router_losses, updated_bias
from moe.layer.config import MoEConfig
from moe.layer.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher
from moe.layer.dispatch_check import WrongDispatchError, check_dispatcher
from moe.layer.dispatch_expert_tensor import ExpertTensorDispatcher
from moe.layer.dispatch_fused import ExchangeSizes, FusedDispatcher
from moe.layer.dispatch_hierarchical import HierarchicalDispatcher, NodeGroups, split_by_node
from moe.layer.experts import GroupedExperts
from moe.layer.moe_layer import MoELayer
from moe.layer.router import Router
from moe.layer.shared_expert import SharedExpert
from moe.layer.types import Dispatched, Losses, MoEOutput, Routing

__all__ = [
    "AllToAllDispatcher",
    "BalanceSettings",
    "Dispatched",
    "Dispatcher",
    "ExchangeSizes",
    "ExpertTensorDispatcher",
    "FusedDispatcher",
    "GroupedExperts",
    "HierarchicalDispatcher",
    "LocalDispatcher",
    "Losses",
    "MoEConfig",
    "MoELayer",
    "MoEOutput",
    "NodeGroups",
    "Router",
    "Routing",
    "SharedExpert",
    "WrongDispatchError",
    "attach_loss",
    "check_dispatcher",
    "router_losses",
    "split_by_node",
    "updated_bias",
]
