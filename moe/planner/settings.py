"""What a plan assumes beside a run's config: the section `plan`, and how a config becomes a Job.

The defaults describe what `moe train` does today. Published runs state other choices, which overrides say:
`plan.precision=mxfp8 plan.dispatcher=deepep plan.overlap_ep=true`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe.config.load import load_as
from moe.config.rules import RULES
from moe.config.schema import RunConfig, Section
from moe.counts.shape import Shape, shape_of
from moe.errors import InputError
from moe.planner.hardware import Gpu
from moe.planner.layout import Layout

Precision = Literal["fp32", "bf16", "fp8", "mxfp8"]
Recompute = Literal[
    "full", "layernorm", "core_attn", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts"
]
# Of model.expert_precision; wide is train.precision. Scales that are powers of two cost what others do.
_EXPERTS: dict[str, Precision | None] = {
    "wide": None,
    "fp8": "fp8",
    "fp8_power_of_two": "fp8",
    "mxfp8": "mxfp8",
}
# What train.recompute means, in the planner's words.
_RECOMPUTED: dict[str, tuple[Recompute, ...]] = {
    "none": (),
    "selective": ("core_attn", "mla_up_proj"),
    "full": ("full",),
}


class PlanSection(Section):
    """Assumptions of a plan that no run of ours has a key for.

    Attributes:
        precision: Of the GEMMs; None takes train.precision, and model.expert_precision in experts. fp8 has
            one scale a tensor, mxfp8 one for 32 numbers.
        grads: Of the gradient buffers and their reduction.
        moments: Of Adam's two moments.
        zero: What data-parallel ranks share out: 0 nothing, 1 optimizer states, 2 gradients, 3 weights; None
            takes the engine's.
        recompute: Parts computed again in the backward pass (arXiv 2205.05198); None takes train.recompute.
        routing: natural loads experts unevenly; balanced is the upper bound that published tables use.
        dispatcher: alltoall sends a row for each expert, hierarchical one for each rank or node, deepep as
            many in fused kernels; None takes parallel.dispatcher.
        overlap_ep: Expert communication runs beside the compute of another micro-batch.
        overlap_p2p: Pipeline transfers run beside compute.
        overlap_tp: Tensor-parallel exchange runs beside the products that it feeds or follows, in as many
            parts as ranks (Transformer Engine's user buffers, torch's async TP).
        cuda_graph: none launches each kernel from Python; partial and full replay recorded launches.
        kernels: Whose saved activations and fusions: ours; torch, the same on a CPU; te, Transformer Engine;
            te_fused, the same with quantisation fused into the experts' activation and permutation.
        cross_entropy: unfused; fused, in fewer passes (Megatron's own); in_place turns the logits into their
            gradient without an fp32 copy (Transformer Engine's).
        fp8_attention: The attention products take 8-bit operands, too.
        fp8_head: The output head takes 8-bit operands, too.
    """

    precision: Precision | None = None
    grads: Literal["fp32", "bf16"] = "fp32"
    moments: Literal["fp32", "bf16"] = "fp32"
    zero: Literal[0, 1, 2, 3] | None = None
    recompute: tuple[Recompute, ...] | None = None
    routing: Literal["natural", "balanced"] = "natural"
    dispatcher: Literal["alltoall", "hierarchical", "deepep", "hybridep"] | None = None
    overlap_ep: bool = False
    overlap_p2p: bool = True
    overlap_tp: bool = False
    cuda_graph: Literal["none", "partial", "full"] = "none"
    kernels: Literal["ours", "te", "te_fused", "torch"] = "ours"
    cross_entropy: Literal["unfused", "fused", "in_place"] = "unfused"
    fp8_attention: bool = False
    fp8_head: bool = False

    @property
    def is_te(self) -> bool:
        """Whether Transformer Engine computes, fused or not."""
        return self.kernels in ("te", "te_fused")


class PlanConfig(RunConfig):
    """A run's config and the plan's assumptions."""

    plan: PlanSection = PlanSection()


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that decides a plan.

    Attributes:
        shape: Sizes of the model.
        gpu: Kind of GPU.
        layout: Ranks along each axis.
        seq_length: Tokens of a sequence.
        global_batch: Sequences a step.
        micro_batch: Sequences at once on a data-parallel rank.
        precision: Of the GEMMs.
        expert_precision: Of those of routed experts.
        fp8_input_store: Routed experts keep the activation's input in 8 bits.
        wide_into_activation: Their products into the activation and its backward are not quantised.
        plan: The other assumptions.
        stage_layers: Layers of each chunk of the pipeline; empty balances them.
        recompute: Parts computed again in the backward pass.
        zero: What data-parallel ranks share out, as in PlanSection.
        overlap_grads: Gradients are reduced during the last backward pass.
        overlap_params: Updated weights are gathered during the first forward pass.
        muon: Matrices have one moment, not AdamW's two.
    """

    shape: Shape
    gpu: Gpu
    layout: Layout
    seq_length: int
    global_batch: int
    micro_batch: int
    precision: Precision
    expert_precision: Precision
    plan: PlanSection
    fp8_input_store: bool = False
    wide_into_activation: bool = False
    stage_layers: tuple[int, ...] = ()
    recompute: tuple[Recompute, ...] = ()
    zero: int = 1
    overlap_grads: bool = False
    overlap_params: bool = False
    muon: bool = False

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        return self.global_batch // (self.micro_batch * self.layout.dp)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step over all ranks."""
        return self.global_batch * self.seq_length

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank outside tensor parallelism."""
        return self.micro_batch * self.seq_length // self.layout.cp

    @property
    def key_ranks(self) -> int:
        """Context-parallel ranks whose keys and values a rank gathers; a ring passes them on (TE)."""
        return 1 if self.plan.is_te else self.layout.cp

    @property
    def wide_bytes(self) -> int:
        """Bytes of an activation, a weight or a message that is not quantised."""
        return 4 if self.precision == "fp32" else 2


def load_plan_config(path: Path, overrides: Sequence[str] = ()) -> PlanConfig:
    """Read a recipe with the keys of `moe train` and of `plan`.

    Raises:
        InputError: As load_config.
    """
    return load_as(PlanConfig, path, overrides, world_size=None, rules=RULES)


def make_job(config: PlanConfig, gpus: int, gpu: Gpu) -> Job:
    """Join config, hardware and layout.

    Raises:
        InputError: The layout does not fit the number of GPUs, the model or the batch.
    """
    job = searched_job(config, gpus, gpu)
    problems = check(job)
    if problems:
        raise InputError("this layout cannot run:\n" + "\n".join(problems))
    return job


def searched_job(config: PlanConfig, gpus: int, gpu: Gpu) -> Job:
    """As make_job, with a layout that may not fit: a search starts from it.

    Raises:
        InputError: The run moves states to the memory of hosts.
    """
    if config.engine.offload != "none":
        raise InputError(
            f"engine.offload={config.engine.offload} cannot be planned: the planner knows neither the links "
            "to hosts nor their CPUs; plan with engine.offload=none, which needs more memory and less time"
        )
    parallel = config.parallel
    plan = config.plan.model_copy(update={"dispatcher": config.plan.dispatcher or parallel.dispatcher})
    return Job(
        shape=shape_of(config.model),
        gpu=gpu,
        layout=Layout(
            gpus=gpus,
            tp=parallel.tp,
            pp=parallel.pp,
            vpp=parallel.vpp,
            ep=parallel.ep,
            etp=parallel.etp,
            cp=parallel.cp,
        ),
        seq_length=config.data.seq_length,
        global_batch=config.train.global_batch_size,
        micro_batch=config.train.micro_batch_size,
        precision=plan.precision or config.train.precision,
        expert_precision=plan.precision or _EXPERTS[config.model.expert_precision] or config.train.precision,
        plan=plan,
        fp8_input_store=config.model.expert_fp8_input_store,
        wide_into_activation=config.model.expert_wide_into_activation,
        stage_layers=parallel.stage_layers,
        recompute=_RECOMPUTED[config.train.recompute] if plan.recompute is None else plan.recompute,
        zero=config.engine.zero_stage if plan.zero is None else plan.zero,
        overlap_grads=parallel.overlap_grad_reduce,
        overlap_params=parallel.overlap_param_gather,
        muon=config.optim.name == "muon",
    )


def check(job: Job) -> list[str]:
    """Why a job cannot be laid out so, one sentence for each reason."""
    layout, shape = job.layout, job.shape
    problems = layout.problems(shape.num_experts)
    if problems:  # dp below would be no whole number
        return problems
    chunks = layout.pp * layout.vpp
    if chunks > shape.num_layers and not job.stage_layers:
        problems.append(f"{layout.pp} stages x {layout.vpp} chunks are more than {shape.num_layers} layers")
    heads, groups = shape.attention.num_heads, shape.attention.num_groups
    if heads % layout.tp or (not shape.attention.is_latent and groups % layout.tp):
        problems.append(f"parallel.tp={layout.tp} does not divide {heads} heads in {groups} groups")
    if job.global_batch % (job.micro_batch * layout.dp):
        problems.append(
            f"train.global_batch_size={job.global_batch} is no multiple of "
            f"train.micro_batch_size * dp = {job.micro_batch} * {layout.dp}"
        )
    elif layout.vpp > 1 and job.num_microbatches % layout.pp:  # chunks take turns in rounds of pp
        problems.append(
            f"{job.num_microbatches} micro-batches are no multiple of parallel.pp={layout.pp}, as "
            f"parallel.vpp={layout.vpp} needs"
        )
    if job.wide_into_activation and job.plan.is_te:
        problems.append(
            "model.expert_wide_into_activation=true is an option of our kernels that "
            f"plan.kernels={job.plan.kernels} lacks; use plan.kernels=ours, or leave it false"
        )
    keys = {job.expert_precision: "model.expert_precision", job.precision: "train.precision"}
    for precision, key in keys.items():
        if precision not in job.gpu.peak_flops:
            allowed = ", ".join(job.gpu.peak_flops)
            named = "plan.precision" if job.plan.precision else key
            problems.append(f"{named}={precision} is not of {job.gpu.name}; allowed: {allowed}")
    return problems
