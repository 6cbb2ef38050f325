"""How long one optimizer step takes, and what it is spent on.

The slowest pipeline stage works through all micro-batches; the pipeline fills and drains once (the bubble);
then gradients are reduced, the optimizer runs, weights are gathered. Every term is a sum of kernels
(roofline.py) and exchanges (collectives.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import reduce

from moe.planner import collectives
from moe.planner.bytes_sent import (
    Gathers,
    context_gathers,
    data_gathers,
    end_gathers,
    exchange,
    exchanges,
    expert_tensor_gathers,
    loss_gathers,
    pipeline_bytes,
    replicated_gradients,
    shared_embedding,
    tensor_gathers,
)
from moe.planner.imbalance import imbalance
from moe.planner.muon import muon_update
from moe.planner.op import Op
from moe.planner.ops import embedding_ops, head_ops, layer_ops, mtp_ops
from moe.planner.roofline import backward_time, forward_time
from moe.planner.settings import Job
from moe.planner.stages import Stage, held_params, stages_of

# Graphs under which Python still launches kernels of experts, and all others: a partial one records
# attention, router and index.
LAUNCHING_EXPERTS = ("none", "partial")
LAUNCHING_OTHERS = ("none",)
# The backward pass is launched by C++ (autograd), about twice as fast as Python's forward. Transformer
# Engine's modules bring their own, in Python.
BACKWARD_LAUNCH = 0.5
# Share of the last backward (first forward) pass beside which gradients (weights) travel; the rest is over
# before the first bucket is full, or not yet begun.
HIDING_SHARE = 0.8
BACKWARD_SHARE = 2 / 3  # of a micro-batch: two products for each of the forward pass


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds by cause; adds and scales.

    Attributes:
        math_s: Tensor cores.
        memory_s: Streaming kernels and what kernels stream.
        launch_s: The GPU waits for Python.
        tp_s: Exposed tensor- and context-parallel communication.
        ep_s: Exposed expert communication, and compute lost to what is hidden.
        pp_s: Exposed transfers between stages.
        bubble_s: The pipeline fills and drains.
        dp_s: Exposed reduction of gradients and gathering of weights.
        optimizer_s: The update.
    """

    math_s: float = 0.0
    memory_s: float = 0.0
    launch_s: float = 0.0
    tp_s: float = 0.0
    ep_s: float = 0.0
    pp_s: float = 0.0
    bubble_s: float = 0.0
    dp_s: float = 0.0
    optimizer_s: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        """Sum of each cause."""
        return Spent(**{name: value + getattr(other, name) for name, value in self.parts.items()})

    def times(self, factor: float) -> Spent:
        """Each cause multiplied."""
        return Spent(**{name: value * factor for name, value in self.parts.items()})

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by cause, in the order above."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def total_s(self) -> float:
        """All of it."""
        return math.fsum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One step.

    Attributes:
        spent: On the slowest stage.
        microbatch_s: Forward and backward of one micro-batch on each stage.
        forward_share: What part of it is forward.
        imbalance: Load of the busiest expert rank over the mean.
        expert_exchange_s: All expert communication of the slowest stage, hidden or not.
    """

    spent: Spent
    microbatch_s: tuple[float, ...]
    forward_share: tuple[float, ...]
    imbalance: float
    expert_exchange_s: float

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.spent.total_s


@dataclass(frozen=True)
class _Pass:
    """Forward and backward of some layers for one micro-batch, before overlap of expert communication."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    math_s: float = 0.0
    forward_cpu_s: float = 0.0  # Python launches
    backward_cpu_s: float = 0.0
    waits_s: float = 0.0  # of the forward pass for Python, where each layer ends its lead
    products_tp_s: float = 0.0  # feeds or follows products of layers
    other_tp_s: float = 0.0
    ep_s: float = 0.0

    def __add__(self, other: _Pass) -> _Pass:
        return _Pass(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, count: int) -> _Pass:
        return _Pass(*(getattr(self, f.name) * count for f in fields(self)))


def step_time(job: Job) -> StepTime:
    """The time of one step, from closed forms alone."""
    passes = _stage_passes(job)
    microbatch = [_overlapped(job, one) for one in passes]
    times = tuple(spent.total_s for spent in microbatch)
    m = job.num_microbatches
    stages = stages_of(job)
    kinds = {stage.kind: (stage, time) for stage, time in zip(stages, times, strict=True)}
    updates = {kind: _update(job, stage, time) for kind, (stage, time) in kinds.items()}
    busy = [one.times(m) + updates[stage.kind] for one, stage in zip(microbatch, stages, strict=True)]
    worst = max(range(len(busy)), key=lambda stage: busy[stage].total_s)
    mean_s = sum(times) / len(times)
    bubble_s = (job.layout.pp - 1) / job.layout.vpp * mean_s
    spent = busy[worst] + Spent(bubble_s=bubble_s, pp_s=_pipeline_s(job) * m)
    return StepTime(
        spent=spent,
        microbatch_s=times,
        forward_share=tuple(one.forward_s / ((one.forward_s + one.backward_s) or 1.0) for one in passes),
        imbalance=imbalance(job),
        expert_exchange_s=passes[worst].ep_s * m,
    )


def _stage_passes(job: Job) -> list[_Pass]:
    dense, moe = _layer_pass(job, dense=True), _layer_pass(job, dense=False)
    passes = []
    for stage in stages_of(job):
        ends = _Pass()
        if stage.has_embedding:
            ends += _ops_pass(job, embedding_ops(job))
        if stage.has_head:
            ends += _ops_pass(job, head_ops(job))
            ends += _mtp_pass(job).times(job.shape.mtp_layers)
        group = collectives.tensor_group(job.layout, job.gpu)
        gathers = (*end_gathers(job, stage), *loss_gathers(job, stage))
        ends += _Pass(other_tp_s=_gathers_s(job, gathers, group))
        passes.append(dense.times(stage.dense_layers) + moe.times(stage.moe_layers) + ends)
    return passes


def _layer_pass(job: Job, *, dense: bool) -> _Pass:
    ops = layer_ops(job, dense=dense)
    layer = _ops_pass(job, ops) + _tensor_pass(job, dense=dense)
    if dense:
        return layer
    layer += _expert_pass(job)
    experts = _ops_pass(job, [op for op in ops if op.of_experts])
    return layer + _Pass(waits_s=_waits_s(job, layer, experts))


def _waits_s(job: Job, layer: _Pass, experts: _Pass) -> float:
    """What the GPU waits for Python in a layer's forward pass if the host must learn the rows of experts.

    Python stops until the GPU has counted them, so it has no lead when it launches the experts, nor, once
    these have caught up, when it launches the rest (Megatron-Core 0.16.1, token_dispatcher.py).
    """
    tp_s = layer.products_tp_s - _hidden_tp_s(job, layer) + layer.other_tp_s
    others_s = layer.forward_s - experts.forward_s + (1 - BACKWARD_SHARE) * tp_s
    others_cpu_s = layer.forward_cpu_s - experts.forward_cpu_s
    experts_s = experts.forward_s + layer.ep_s / 2
    return max(0.0, others_cpu_s - others_s) + max(0.0, experts.forward_cpu_s - experts_s)


def _counts_on_host(job: Job) -> bool:
    """Whether each layer ends Python's lead: not if the step is one graph, nor beside another micro-batch.

    A dense model, planned as one expert, has no rows to count.
    """
    needed = job.shape.num_experts > 1 and (job.layout.ep > 1 or job.plan.kernels == "te")
    return needed and job.plan.cuda_graph != "full" and not job.plan.overlap_ep


def _mtp_pass(job: Job) -> _Pass:
    return _ops_pass(job, mtp_ops(job)) + _layer_pass(job, dense=False)


def _ops_pass(job: Job, ops: Iterable[Op]) -> _Pass:
    busiest = imbalance(job)
    return reduce(_Pass.__add__, (_op_pass(job, op, busiest if op.of_experts else 1.0) for op in ops))


def _op_pass(job: Job, op: Op, load: float) -> _Pass:
    forward, backward = forward_time(op, job.gpu), backward_time(op, job.gpu)
    again = 1 if _is_recomputed(job, op) else 0
    graphs = LAUNCHING_EXPERTS if op.of_experts else LAUNCHING_OTHERS
    backward_launches = backward.launches * (1.0 if job.plan.is_te else BACKWARD_LAUNCH)
    launch_s = job.gpu.launch_s if job.plan.cuda_graph in graphs else 0.0
    return _Pass(
        forward_s=load * forward.total_s,
        backward_s=load * (backward.total_s + again * forward.total_s),
        math_s=load * (forward.math_s * (1 + again) + backward.math_s),
        forward_cpu_s=forward.launches * launch_s,
        backward_cpu_s=(forward.launches * again + backward_launches) * launch_s,
    )


def _is_recomputed(job: Job, op: Op) -> bool:
    chosen = job.recompute
    return "full" in chosen or op.part in chosen or (op.part == "moe_act" and "moe" in chosen)


def _tensor_pass(job: Job, *, dense: bool) -> _Pass:
    """Sequence, expert-tensor and context parallelism of one layer."""
    layout, gpu = job.layout, job.gpu
    of_products = _gathers_s(job, tensor_gathers(job, dense=dense), collectives.tensor_group(layout, gpu))
    other = _gathers_s(job, (context_gathers(job),), collectives.context_group(layout, gpu))
    if not dense:
        group = collectives.expert_tensor_group(layout, gpu)
        other += _gathers_s(job, expert_tensor_gathers(job), group) * imbalance(job)
    return _Pass(products_tp_s=of_products, other_tp_s=other)


def _gathers_s(job: Job, gathers: tuple[Gathers, ...], group: collectives.Group) -> float:
    return sum(g.count * collectives.gather_s(g.whole_bytes, group, job.gpu) for g in gathers)


def _expert_pass(job: Job) -> _Pass:
    """Dispatch and combine, forward and backward."""
    group = collectives.expert_group(job.layout, job.gpu)
    once = collectives.exchange_s(exchange(job, group), group, job.gpu)
    return _Pass(ep_s=once * exchanges(job) * imbalance(job))


def _overlapped(job: Job, one: _Pass) -> Spent:
    """Causes of one micro-batch, with communication beside compute if asked for."""
    busy_s = one.forward_s + one.backward_s
    hidden_tp_s = _hidden_tp_s(job, one)
    tp_s = one.products_tp_s - hidden_tp_s + one.other_tp_s
    beside_s = job.gpu.efficiency.ep_hidden * one.ep_s
    hidden_s = min(beside_s, busy_s - hidden_tp_s) if job.plan.overlap_ep else 0.0
    exposed_s = one.ep_s - hidden_s * (1 - job.gpu.efficiency.ep_sms)
    launch_s = max(0.0, one.forward_cpu_s + one.backward_cpu_s - busy_s - tp_s - exposed_s)
    if _counts_on_host(job):
        backward_s = one.backward_s + BACKWARD_SHARE * tp_s + exposed_s / 2
        launch_s = max(launch_s, one.waits_s + max(0.0, one.backward_cpu_s - backward_s))
    return Spent(
        math_s=one.math_s,
        memory_s=busy_s - one.math_s,
        launch_s=launch_s,
        tp_s=tp_s,
        ep_s=exposed_s,
    )


def _hidden_tp_s(job: Job, one: _Pass) -> float:
    """Of as many parts as ranks all but one travel beside the products of the others."""
    beside_s = one.products_tp_s * (1 - 1 / job.layout.tp)
    return min(beside_s, one.forward_s + one.backward_s) if job.plan.overlap_tp else 0.0


def _pipeline_s(job: Job) -> float:
    """Exposed transfers between stages, for a micro-batch: forward and backward of each chunk."""
    layout = job.layout
    if layout.pp == 1:
        return 0.0
    near = layout.gpus // layout.pp < job.gpu.nvlink_domain
    once_s = collectives.send_s(pipeline_bytes(job), job.gpu, near=near)
    return 2 * layout.vpp * (collectives.HOP_S if job.plan.overlap_p2p else once_s)


def _update(job: Job, stage: Stage, microbatch_s: float) -> Spent:
    """Reduce gradients, update, gather weights; once a step."""
    of_dense, of_experts = data_gathers(job, stage)
    dense_group = collectives.dense_group(job.layout, job.gpu)
    expert_group = collectives.expert_data_group(job.layout, job.gpu)
    reduce_s, gather_s = (
        _gathers_s(job, (dense,), dense_group) + _gathers_s(job, (experts,), expert_group)
        for dense, experts in zip(of_dense, of_experts, strict=True)
    )
    beside_s = HIDING_SHARE * microbatch_s
    if job.zero == 3:  # weights are gathered forward and backward in every micro-batch, beside compute
        exposed_s = max(0.0, gather_s + reduce_s - beside_s * job.num_microbatches)
    else:
        reducing = job.num_microbatches if job.zero == 2 else 1
        hidden_reduce_s = beside_s * BACKWARD_SHARE * reducing if job.overlap_grads else 0.0
        hidden_gather_s = beside_s * (1 - BACKWARD_SHARE) if job.overlap_params else 0.0
        exposed_s = max(0.0, reduce_s - hidden_reduce_s) + max(0.0, gather_s - hidden_gather_s)
    spent = Spent(dp_s=exposed_s, optimizer_s=_optimizer_s(job, *held_params(job, stage)))
    spent += _replicas(job, stage)
    return spent + _muon(job, stage) if job.muon else spent


def _replicas(job: Job, stage: Stage) -> Spent:
    """Gradients of weights that tensor-parallel ranks or two stages both hold: nothing runs beside it."""
    layout, gpu = job.layout, job.gpu
    tp_s = _gathers_s(job, (replicated_gradients(job, stage),), collectives.tensor_group(layout, gpu))
    between_stages = layout.gpus // layout.pp * (layout.pp - 1)
    pair = collectives.Group(size=2, near=2 if between_stages < gpu.nvlink_domain else 1)
    return Spent(tp_s=tp_s, pp_s=_gathers_s(job, (shared_embedding(job, stage),), pair))


def _muon(job: Job, stage: Stage) -> Spent:
    """What Muon's matrices take beyond AdamW's stream: nothing runs beside it."""
    layout, gpu, update = job.layout, job.gpu, muon_update(job, stage)
    dp_s = collectives.gather_s(update.dense_momenta_bytes, collectives.dense_group(layout, gpu), gpu)
    dp_s += collectives.gather_s(update.expert_momenta_bytes, collectives.expert_data_group(layout, gpu), gpu)
    tp_s = collectives.gather_s(update.dense_matrices_bytes, collectives.tensor_group(layout, gpu), gpu)
    experts_tp = collectives.expert_tensor_group(layout, gpu)
    tp_s += collectives.gather_s(update.expert_matrices_bytes, experts_tp, gpu)
    precision = "fp32" if job.precision == "fp32" else "bf16"
    rate = gpu.peak_flops[precision] * gpu.efficiency.gemm_bf16
    return Spent(dp_s=dp_s, tp_s=tp_s, optimizer_s=update.flops / rate)


def _optimizer_s(job: Job, dense: int, experts: int) -> float:
    """Time to stream the states through Adam. Every rank updates its share if they are shared out, else all.

    All gradients are zeroed and scaled; of the share, the norm reads and clipping rewrites gradients, Adam
    reads gradient, weight and moments and writes all but the gradient, and weights are copied to the model.
    """
    share = (1, 1) if job.zero == 0 else (job.layout.dense_replicas, job.layout.edp)
    moment = 4 if job.plan.moments == "fp32" else 2
    gradient = 4 if job.plan.grads == "fp32" else 2
    per_param = 4 * gradient + 2 * 4 + 2 * 2 * moment + 4 + job.wide_bytes
    whole = 3 * gradient * (dense + experts)
    updated = per_param * (dense / share[0] + experts / share[1])
    return (updated + whole) / (job.gpu.hbm_bytes_per_s * job.gpu.efficiency.hbm)
