"""Bytes on the fullest rank of each pipeline stage, part by part.

States follow ZeRO (arXiv 1910.02054): data-parallel ranks share out optimizer states (1), gradients (2),
weights (3). Experts are shared out over their own, smaller group of replicas.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from moe.counts.counts import params_on_rank
from moe.counts.weights import block_weights
from moe.planner.activations import (
    QUANTISED_BYTES,
    Saved,
    graph_bytes,
    join_saved,
    keeps_one_copy,
    layer_saved,
    logits_bytes,
    workspace_bytes,
)
from moe.planner.muon import momenta_bytes
from moe.planner.settings import Job
from moe.planner.stages import Stage, held_params, stages_of, wide_params

GIB = 2**30
# Context, NCCL's buffers and the allocator's unused blocks, beside what tensors take; a share of tensors
# and a constant. PyTorch's expandable segments leave 2-4 %; a CUDA context and communicators take 1.5-3
# GiB.
CONTEXT_BYTES = 2.5 * GIB
SLACK = 0.03


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes of tensors on the fullest rank of a stage; parts that peak at different moments are all counted.

    Attributes:
        stage: Its index.
        weights: Parameters, as GEMMs read them.
        gradients: Gradient buffers.
        optimizer: Main parameters and moments.
        norms: Saved by norms and the residual stream.
        attention: Saved by attention.
        router: Saved by the router.
        dispatch: Saved to bring rows home.
        experts: Saved by routed experts.
        dense: Saved by dense and shared feed-forwards.
        logits: Of the output head.
        graphs: Buffers of recorded launches.
        workspace: Of the backward pass of one layer: what is computed again, and gradients of activations.
            Of the update, by what that exceeds all that the backward pass holds.
    """

    stage: int
    weights: float
    gradients: float
    optimizer: float
    norms: float
    attention: float
    router: float
    dispatch: float
    experts: float
    dense: float
    logits: float
    graphs: float
    workspace: float

    @property
    def total_bytes(self) -> float:
        """All tensors."""
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> float:
        """What the GPU must have: tensors, context and slack."""
        return self.total_bytes * (1 + SLACK) + CONTEXT_BYTES

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by part."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "stage"}


def memory_of_stages(job: Job) -> tuple[StageMemory, ...]:
    """The memory of every stage."""
    stages = stages_of(job)
    saved = layer_saved(job, dense=True), layer_saved(job, dense=False)
    held = {kind: _held(job, stage) for kind, stage in {stage.kind: stage for stage in stages}.items()}
    return tuple(_memory(job, stage, held[stage.kind], *saved) for stage in stages)


def in_flight(job: Job, stage: Stage) -> float:
    """Micro-batches whose activations a stage holds at its peak.

    1F1B (arXiv 2104.04473): as many as stages from here to the end. Interleaved: 2 (pp - i - 1) + (v - 1) pp
    chunks warm up, and one more is in work. Overlapping expert communication works on two at once.
    """
    layout = job.layout
    after = layout.pp - stage.index - 1
    chunks = after + 1 if layout.vpp == 1 else 2 * after + (layout.vpp - 1) * layout.pp + 1
    if job.plan.overlap_ep and layout.pp > 1:
        chunks += 1
    return min(chunks, job.num_microbatches * layout.vpp) / layout.vpp


@dataclass(frozen=True)
class _Held:
    """Bytes of what stays all the time, and of what only an update needs."""

    states: dict[str, float]
    update: float


def _held(job: Job, stage: Stage) -> _Held:
    return _Held(_states(job, stage), max(*momenta_bytes(job, stage), _adamw_bytes(job, stage)))


def _memory(job: Job, stage: Stage, held: _Held, dense: Saved, moe: Saved) -> StageMemory:
    mtp = job.shape.mtp_layers if stage.has_head else 0
    # Without a pipeline, overlap interleaves two micro-batches: one's layers appear as the other's go.
    ahead = 1 if job.plan.overlap_ep and job.layout.pp == 1 else 0
    count = in_flight(job, stage)
    of_dense, of_moe = count * stage.dense_layers, count * stage.moe_layers + mtp + ahead
    saved = {
        field.name: of_dense * getattr(dense, field.name) + of_moe * getattr(moe, field.name)
        for field in fields(Saved)
    }
    saved["norms"] += mtp * join_saved(job)
    logits = logits_bytes(job) * (1 + job.shape.mtp_layers) if stage.has_head else 0.0
    layers = stage.dense_layers + stage.moe_layers + mtp
    kinds = [True] * (stage.dense_layers > 0) + [False] * (stage.moe_layers + mtp > 0)
    backward = (1 + ahead) * max((workspace_bytes(job, dense=kind) for kind in kinds), default=0.0)
    # The optimizer's own temporaries come when all that was saved is gone.
    update = held.update - sum(saved.values()) - logits
    return StageMemory(
        stage=stage.index,
        **held.states,
        **saved,
        logits=logits,
        graphs=layers * graph_bytes(job),
        workspace=max(backward, update),
    )


def _states(job: Job, stage: Stage) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer states."""
    dense, experts = held_params(job, stage)
    zero = job.zero
    whole = dense + experts
    shared = dense / job.layout.dense_replicas + experts / job.layout.edp
    held = {level: shared if zero >= level else whole for level in (1, 2, 3)}
    is_fp32 = job.precision == "fp32"
    moment = 4 if job.plan.moments == "fp32" else 2
    # fp32 weights are their own main copy.
    states = held[1] * (2 * moment + (0 if is_fp32 else 4))
    return {
        "weights": held[3] * _weight_bytes(job) + _wide_ends(job, stage) + _gathered_layer(job, stage),
        "gradients": held[2] * (4 if is_fp32 or job.plan.grads == "fp32" else 2),
        "optimizer": states - (_matrices(job, stage) * moment if job.muon else 0),
    }


def _adamw_bytes(job: Job, stage: Stage) -> float:
    """The root of the second moments that torch's AdamW makes of all tensors at once (`_multi_tensor_adam`).

    Megatron-Core takes it where neither Transformer Engine nor Apex is installed, and updates experts apart
    from the rest. Plans assume so without plan.kernels=te; a fused AdamW needs nothing.
    """
    if job.plan.is_te:
        return 0.0
    replicas = (job.layout.dense_replicas, job.layout.edp) if job.zero >= 1 else (1, 1)
    of_muon = held_params(job, stage, of_muon=True) if job.muon else (0, 0)
    held = zip(held_params(job, stage), of_muon, replicas, strict=True)
    moment = 4 if job.plan.moments == "fp32" else 2
    return max((params - matrices) / ranks for params, matrices, ranks in held) * moment


def _gathered_layer(job: Job, stage: Stage) -> float:
    """ZeRO-3 gathers the weights of a layer while it computes; of the largest."""
    if job.zero < 3:
        return 0.0
    layout, kinds = job.layout, {True: stage.dense_layers, False: stage.moe_layers}
    weights = [block_weights(job.shape, dense=dense) for dense, layers in kinds.items() if layers]
    held = [sum(params_on_rank(one, tp=layout.tp, expert_ranks=layout.expert_ranks)) for one in weights]
    return max(held, default=0) * _weight_bytes(job)


def _matrices(job: Job, stage: Stage) -> float:
    """Numbers that Muon moves, of those whose optimizer state a rank has."""
    layout = job.layout
    dense, experts = held_params(job, stage, of_muon=True)
    is_shared = job.zero >= 1
    return dense / (layout.dense_replicas if is_shared else 1) + experts / (layout.edp if is_shared else 1)


def _weight_bytes(job: Job) -> float:
    """Two copies of 8 bits, by rows and by columns, take the place of one of 16."""
    if job.precision == "mxfp8":
        return 2 * QUANTISED_BYTES
    return 1 if keeps_one_copy(job, job.precision) else job.wide_bytes


def _wide_ends(job: Job, stage: Stage) -> float:
    """What embeddings and the head have more than 8 bits where other weights have one such copy."""
    if not keeps_one_copy(job, job.precision):
        return 0.0
    held = wide_params(job, stage) / (job.layout.dense_replicas if job.zero == 3 else 1)
    return held * (job.wide_bytes - 1)
