"""The experts' gated feed-forward, from tokens to tokens."""

from moe.kernels.expert_mlp.activation import ACTIVATIONS
from moe.kernels.expert_mlp.op import PRECISIONS, expert_mlp

__all__ = ["ACTIVATIONS", "PRECISIONS", "expert_mlp"]
