"""Our kernels as an experts implementation of Hugging Face transformers: `experts_implementation="moe"`.

    from moe.transformers_backend import register_with_transformers

    register_with_transformers()
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moe")

transformers 5 keeps the routed experts of a layer in one module, and looks its forward up by name in a
registry. What stands there under our name gets the module, the tokens and the router's choice; weights stay
where transformers put them, so saving, loading, sharding and its expert parallelism are untouched.

The kernels compute SwiGLU experts. Experts that need anything else are refused, never approximated.
Shapes: T tokens, K top-k, D model, F expert hidden, G = 2F gate and up, e experts held here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import InputError
from moe.kernels.expert_mlp import expert_mlp
from moe.kernels.permute_index import permute_index

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "moe"
# Where transformers defines its registry, and the plain gate of experts that have none of their own.
REGISTRY = "transformers.integrations.moe"


class RegisteredExperts(Protocol):
    """What transformers promises of a module whose forward is looked up in its registry."""

    gate_up_proj: Tensor  # [e, G, D], or [e, D, G] if transposed
    down_proj: Tensor  # [e, D, F], or [e, F, D]
    act_fn: object
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    is_concatenated: bool
    _apply_gate: Any


def register_with_transformers() -> None:
    """Make `experts_implementation="moe"` known to transformers, for this process; may be called again.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, experts_forward)


def switch_experts(model: PreTrainedModel) -> int:
    """Let our kernels compute the experts of a model that is already built; registers them if need be.

    Unlike `experts_implementation="moe"`, which transformers accepts for any model, this says at once if
    there is something that our kernels cannot compute.

    Args:
        model: on any device, `meta` too; left as it is if it is refused.

    Returns:
        How many modules of experts use our kernels now.

    Raises:
        InputError: the experts need more than SwiGLU, or the model has none in transformers' registry.
    """
    experts = [module for module in model.modules() if _is_registered(module)]
    if not experts:
        raise InputError(
            f"{type(model).__name__} has no experts that go through transformers' registry: it is a dense "
            "model, or computes its experts in code of its own. Use it as it is"
        )
    for module in experts:
        _require_swiglu(module)
    register_with_transformers()
    model.set_experts_implementation(NAME)
    return len(experts)


def experts_forward(
    experts: RegisteredExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The weighted sum over each token's experts, as transformers' own implementations return it.

    Args:
        experts: a module of transformers whose class has `use_experts_implementation`.
        hidden_states: x_TD.
        top_k_index: expert ids, int64 [T, K]. An id past the last expert is another rank's: it adds nothing.
        top_k_weights: combine weights [T, K].

    Returns:
        y_TD in x's dtype. Products are in autocast's dtype where it is on, else in that of the weights.

    Raises:
        InputError: the experts need more than SwiGLU.
        ValueError: shapes or dtypes that the kernels do not take.
    """
    _require_swiglu(experts)
    w_gate_up, w_down = experts.gate_up_proj, experts.down_proj
    if experts.is_transposed:
        w_gate_up, w_down = w_gate_up.mT, w_down.mT
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else w_gate_up.dtype
    y_TD = expert_mlp(
        hidden_states.to(dtype),
        w_gate_up.to(dtype),
        w_down.to(dtype),
        top_k_weights.to(torch.float64 if dtype == torch.float64 else torch.float32),
        permute_index(top_k_index.flatten(), w_down.shape[0]),
    )
    return y_TD.to(hidden_states.dtype)


def _is_registered(module: Any) -> TypeGuard[RegisteredExperts]:
    """Whether transformers looks this module's forward up in its registry."""
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")


def _require_swiglu(experts: RegisteredExperts) -> None:
    needs = _beyond_swiglu(experts)
    if needs:
        raise InputError(
            f'{type(experts).__name__} cannot use experts_implementation="{NAME}": it needs '
            f"{' and '.join(needs)}, and our kernels compute SwiGLU without biases. "
            'Use experts_implementation="grouped_mm" or "eager"'
        )


def _beyond_swiglu(experts: RegisteredExperts) -> list[str]:
    """What these experts compute that down(silu(gate(x)) * up(x)) does not."""
    needs = []
    if experts.has_bias:
        needs.append("biases")
    if experts.has_post_expert_norm:
        needs.append("a norm after each expert")
    if not experts.is_concatenated:
        needs.append("interleaved gate and up rows")
    gate = type(experts)._apply_gate
    if not experts.has_gate:
        needs.append("experts without a gate")
    elif gate.__module__ != REGISTRY:
        needs.append(f"its own gate, {gate.__qualname__}")
    elif not _is_silu(experts.act_fn):
        needs.append(f"the activation {getattr(experts.act_fn, '__name__', type(experts.act_fn).__name__)}")
    return needs


def _is_silu(activation: object) -> bool:
    from transformers.activations import SiLUActivation

    return activation is F.silu or isinstance(activation, (nn.SiLU, SiLUActivation))
