"""Other people's layers of experts, on the same weights, each only where it is installed and can run.

The interfaces were read in the sources named here; whether an adapter is right is for the verdict to say. (In
Triton's interpreter, those of Liger at ead96b61 and ScatterMoE at 47b5e15 were.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problem import Problem
from benchmarks.variants import NotHereError, Variant, leaves_of


def hugging_face(problem: Problem, implementation: str) -> Variant:
    """Hugging Face's Qwen3-MoE experts; `eager` is its loop over experts, `grouped_mm` its fast path."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as error:
        raise NotHereError(f"transformers with Qwen3MoeExperts is not installed: {error}") from error
    shape = problem.shape
    config = Qwen3MoeConfig(
        num_experts=shape.E, hidden_size=shape.H, moe_intermediate_size=shape.I, hidden_act="silu"
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(problem.w_gate_up_EGD.detach())
    experts.down_proj = torch.nn.Parameter(problem.w_down_EDF.detach())
    return Variant(
        (experts.gate_up_proj, experts.down_proj),
        # Its router gives weights in the tokens' dtype.
        lambda x_TD, weights_TK: experts(x_TD, problem.ids_TK, weights_TK.to(x_TD.dtype)),
    )


def liger(problem: Problem) -> Variant:
    """Liger-Kernel >= 0.7 (linkedin/Liger-Kernel, src/liger_kernel/ops/fused_moe.py), Triton."""
    _require_cuda(problem)
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError as error:
        raise NotHereError(f"liger-kernel >= 0.7 is not installed: {error}") from error
    ids_TK = problem.ids_TK.int()
    parameters = leaves_of(problem.w_gate_up_EGD, problem.w_down_EDF)
    return Variant(
        parameters,
        lambda x_TD, weights_TK: LigerFusedMoEFunction.apply(
            x_TD, *parameters, ids_TK, weights_TK.to(x_TD.dtype)
        ),
    )


def sonic_moe(problem: Problem) -> Variant:
    """SonicMoE (Dao-AILab/sonic-moe, sonicmoe/functional), CuTe; older ones take gate and up in turns."""
    _require_cuda(problem)
    try:
        from sonicmoe.enums import ActivationType
        from sonicmoe.functional import moe_general_routing_inputs
    except ImportError as error:
        raise NotHereError(f"sonicmoe is not installed: {error}") from error
    T, K = problem.ids_TK.shape
    tokens_N = torch.arange(T, device="cuda", dtype=torch.int32).repeat_interleave(K)
    ids_N = problem.ids_TK.flatten().int()
    takes_halves = "concat_layout" in inspect.signature(moe_general_routing_inputs).parameters
    w_gate_up_EGD = problem.w_gate_up_EGD if takes_halves else in_turns(problem.w_gate_up_EGD)
    parameters = leaves_of(w_gate_up_EGD, problem.w_down_EDF)
    options = {"concat_layout": True} if takes_halves else {}

    def forward(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        w_gate_up_GDE, w_down_DFE = (weight.permute(1, 2, 0) for weight in parameters)
        y_TD, _ = moe_general_routing_inputs(
            x_TD,
            weights_TK.flatten().to(x_TD.dtype),
            tokens_N,
            ids_N,
            w_gate_up_GDE,
            None,
            w_down_DFE,
            None,
            E=problem.shape.E,
            stream_id=torch.cuda.current_stream().cuda_stream,
            activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=False,
            **options,
        )
        return y_TD

    return Variant(
        parameters,
        forward,
        lambda gate_up, down: (gate_up if takes_halves else in_halves(gate_up), down),
    )


def scatter_moe(problem: Problem) -> Variant:
    """ScatterMoE (shawntan/scattermoe, scattermoe/mlp.py), Triton; its up rows come before the gate's."""
    _require_cuda(problem)
    try:
        from scattermoe.mlp import GLUMLP
    except ImportError as error:
        raise NotHereError(f"scattermoe is not installed: {error}") from error
    shape = problem.shape
    with torch.device("meta"):
        layer = GLUMLP(shape.H, shape.I, shape.E, shape.K)
    layer.experts.weight = torch.nn.Parameter(swapped(problem.w_gate_up_EGD))
    layer.output_experts.weight = torch.nn.Parameter(problem.w_down_EDF.detach())
    return Variant(
        (layer.experts.weight, layer.output_experts.weight),
        lambda x_TD, weights_TK: layer(x_TD, weights_TK.to(x_TD.dtype), problem.ids_TK),
        lambda up_gate, down: (swapped(up_gate), down),
    )


def mega_blocks(problem: Problem) -> Variant:
    """MegaBlocks (databricks/megablocks, layers/dmoe.py) with grouped GEMMs; bf16 only."""
    _require_cuda(problem)
    try:
        from megablocks.grouped_gemm_util import assert_grouped_gemm_is_available
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import ParallelDroplessMLP

        assert_grouped_gemm_is_available()
    except (ImportError, AssertionError) as error:
        raise NotHereError(f"megablocks with grouped_gemm is not installed: {error}") from error
    if problem.x_TD.dtype != torch.bfloat16:
        raise NotHereError(f"megablocks takes bf16, not {problem.x_TD.dtype}")
    shape = problem.shape
    arguments = Arguments(
        hidden_size=shape.H,
        ffn_hidden_size=shape.I,
        moe_num_experts=shape.E,
        moe_top_k=shape.K,
        moe_loss_weight=0.0,
        activation_fn=F.silu,
        mlp_type="glu",
        mlp_impl="grouped",
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=True,
    )
    layer = ParallelDroplessMLP(arguments)
    gate_EFD, up_EFD = problem.w_gate_up_EGD.chunk(2, dim=1)
    weights = (gate_EFD, up_EFD, problem.w_down_EDF.transpose(1, 2))
    layer.mlp.w1, layer.mlp.v1, layer.mlp.w2 = (
        torch.nn.Parameter(weight.flatten(0, 1).contiguous()) for weight in weights
    )

    def ours(*grads: Tensor) -> tuple[Tensor, Tensor]:
        gate_EFD, up_EFD, down_EFD = (grad.view(shape.E, shape.I, shape.H) for grad in grads)
        return torch.cat([gate_EFD, up_EFD], dim=1), down_EFD.transpose(1, 2)

    return Variant(
        (layer.mlp.w1, layer.mlp.v1, layer.mlp.w2),
        lambda x_TD, weights_TK: layer(x_TD, None, weights_TK.to(x_TD.dtype), problem.ids_TK),
        ours,
    )


def _require_cuda(problem: Problem) -> None:
    if not problem.x_TD.is_cuda:
        raise NotHereError("it runs on CUDA only")


def in_turns(w_EGD: Tensor) -> Tensor:
    """Gate rows, then up rows, as gate, up, gate, up."""
    return torch.stack(w_EGD.detach().chunk(2, dim=1), dim=2).flatten(1, 2)


def in_halves(w_EGD: Tensor) -> Tensor:
    """The inverse of in_turns."""
    return torch.cat([w_EGD[:, 0::2], w_EGD[:, 1::2]], dim=1)


def swapped(w_EGD: Tensor) -> Tensor:
    """The two halves of the rows, the second first."""
    first, second = w_EGD.detach().chunk(2, dim=1)
    return torch.cat([second, first], dim=1)


RIVALS: dict[str, Callable[[Problem], Variant]] = {
    "hf_eager": lambda problem: hugging_face(problem, "eager"),
    "hf_grouped_mm": lambda problem: hugging_face(problem, "grouped_mm"),
    "liger": liger,
    "sonicmoe": sonic_moe,
    "scattermoe": scatter_moe,
    "megablocks": mega_blocks,
}
