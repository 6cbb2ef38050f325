"""Our kernels as an experts implementation of Hugging Face transformers: `experts_implementation="moe"`.

    from moe.transformers_backend import register_with_transformers

    register_with_transformers()
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moe")

transformers 5 keeps the routed experts of a layer in one module, and looks its forward up by name in a
registry. What stands there under our name gets the module, the tokens and the router's choice; weights stay
where transformers put them, so saving, loading, sharding and its expert parallelism are untouched.

The kernels compute SwiGLU experts and those of gpt-oss. Experts that need anything else are refused, never
approximated. gpt-oss keeps gate and up in turns, which the kernels do not read: each forward copies these
weights of a layer into order, and the copy stays until the layer's backward.
Shapes: T tokens, K top-k, D model, F expert hidden, G = 2F gate and up, e experts held here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import InputError
from moe.kernels.expert_mlp import expert_mlp
from moe.kernels.expert_mlp.activation import CLAMP, CLAMPED_SLOPE
from moe.kernels.permute_index import permute_index

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "moe"
# Where transformers defines its registry, and the plain gate of experts that have none of their own.
REGISTRY = "transformers.integrations.moe"
# The gate of transformers that computes `clamped_swiglu` of kernels/expert_mlp/activation.py.
CLAMPED_GATE = ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts._apply_gate")


class RegisteredExperts(Protocol):
    """What transformers promises of a module whose forward is looked up in its registry."""

    gate_up_proj: Tensor  # [e, G, D], or [e, D, G] if transposed
    down_proj: Tensor  # [e, D, F], or [e, F, D]
    gate_up_proj_bias: Tensor  # [e, G], if has_bias
    down_proj_bias: Tensor  # [e, D], if has_bias
    act_fn: object
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    is_concatenated: bool  # gate rows first, then up rows; otherwise in turns
    _apply_gate: Any


def register_with_transformers() -> None:
    """Make `experts_implementation="moe"` known to transformers, for this process; may be called again.

    Raises:
        ImportError: transformers is not installed, or older than version 5.
    """
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            f"experts_implementation=\"{NAME}\" needs transformers 5: pip install 'joulemoe[convert]'"
        ) from error
    ExpertsInterface.register(NAME, experts_forward)


def switch_experts(model: PreTrainedModel) -> int:
    """Let our kernels compute the experts of a model that is already built; registers them if need be.

    Unlike `experts_implementation="moe"`, which transformers accepts for any model, this says at once if
    there is something that our kernels cannot compute. All families of `moe convert` go through the registry
    (a test lists them), so nothing here replaces modules: a model keeps its parameters and their names.

    Args:
        model: on any device, `meta` too; left as it is if it is refused.

    Returns:
        How many modules of experts use our kernels now.

    Raises:
        InputError: the experts need what our kernels do not compute, or are not in transformers' registry.
    """
    experts = [module for module in model.modules() if _is_registered(module)]
    if not experts:
        raise InputError(
            f"{type(model).__name__} has no experts that go through transformers' registry: it is a dense "
            "model, or computes its experts in code of its own. Use it as it is"
        )
    for module in experts:
        _require_known(module)
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
        InputError: the experts need what our kernels do not compute.
        ValueError: shapes or dtypes that the kernels do not take.
    """
    _require_known(experts)
    device = hidden_states.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else experts.gate_up_proj.dtype
    w_gate_up, w_down = experts.gate_up_proj.to(dtype), experts.down_proj.to(dtype)
    if not experts.is_concatenated:
        w_gate_up = _gate_first(w_gate_up, dim=2 if experts.is_transposed else 1)
    if experts.is_transposed:
        w_gate_up, w_down = w_gate_up.mT, w_down.mT
    y_TD = expert_mlp(
        hidden_states.to(dtype),
        w_gate_up,
        w_down,
        top_k_weights.to(torch.float64 if dtype == torch.float64 else torch.float32),
        permute_index(top_k_index.flatten(), w_down.shape[0]),
        activation="clamped_swiglu" if _is_clamped(experts) else "swiglu",
        biases=_biases(experts, dtype) if experts.has_bias else None,
    )
    return y_TD.to(hidden_states.dtype)


def _biases(experts: RegisteredExperts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    b_gate_up, b_down = experts.gate_up_proj_bias.to(dtype), experts.down_proj_bias.to(dtype)
    return b_gate_up if experts.is_concatenated else _gate_first(b_gate_up, dim=1), b_down


def _gate_first(interleaved: Tensor, *, dim: int) -> Tensor:
    """Gate and up in turns along `dim` -> all of gate, then all of up. A copy: no stride says it."""
    pairs: Tensor = interleaved.unflatten(dim, (-1, 2))
    return pairs.transpose(dim, dim + 1).flatten(dim, dim + 1)


def _is_registered(module: Any) -> TypeGuard[RegisteredExperts]:
    """Whether transformers looks this module's forward up in its registry."""
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")


def _require_known(experts: RegisteredExperts) -> None:
    needs = _beyond_kernels(experts)
    if needs:
        raise InputError(
            f'{type(experts).__name__} cannot use experts_implementation="{NAME}": it needs '
            f"{' and '.join(needs)}, and our kernels compute SwiGLU and gpt-oss's clamped one. "
            'Use experts_implementation="grouped_mm" or "eager"'
        )


def _beyond_kernels(experts: RegisteredExperts) -> list[str]:
    """What these experts compute that the kernels do not."""
    needs = []
    if experts.has_post_expert_norm:
        needs.append("a norm after each expert")
    gate = type(experts)._apply_gate
    if not experts.has_gate:
        needs.append("experts without a gate")
    elif _is_clamped(experts):
        pass
    elif gate.__module__ != REGISTRY:
        needs.append(f"its own gate, {gate.__qualname__}")
    elif not _is_silu(experts.act_fn):
        needs.append(f"the activation {getattr(experts.act_fn, '__name__', type(experts.act_fn).__name__)}")
    return needs


def _is_clamped(experts: Any) -> bool:
    """Whether the gate is gpt-oss's, with the numbers that the kernels have."""
    gate = type(experts)._apply_gate
    if (gate.__module__, gate.__qualname__) != CLAMPED_GATE:
        return False
    return bool((experts.alpha, experts.limit) == (CLAMPED_SLOPE, CLAMP))


def _is_silu(activation: object) -> bool:
    from transformers.activations import SiLUActivation

    return activation is F.silu or isinstance(activation, (nn.SiLU, SiLUActivation))
