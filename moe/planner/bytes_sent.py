"""What a rank sends in one optimizer step, by cause, in closed form.

Bytes are those of a ring, n ranks: an all-gather or reduce-scatter sends (n - 1) / n of the whole tensor, an
all-reduce twice that, an all-to-all the rows of other ranks, a transfer the tensor. tests/planner counts what
gloo ranks really send and compares. step.py turns the same volumes into time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from moe.planner.collectives import Exchange, Group, exchange_bytes, expected_distinct
from moe.planner.muon import muon_update
from moe.planner.settings import Job
from moe.planner.stages import Stage, held_params, router_params, stage_weights, stages_of, wide_params

FP32_BYTES = 4
INT64_BYTES = 8
# An all-reduce is a reduce-scatter and an all-gather.
ALL_REDUCE = 2
# Dispatchers that send a row once to a node and once to a rank there.
DEDUPLICATING = ("hierarchical", "deepep", "hybridep")
# Of a rank's losses (4 numbers of 8 bytes), its squared gradient norm and its wish to stop (4 each).
STEP_SUMS_BYTES = 4 * 8 + 4 + 4


@dataclass(frozen=True, kw_only=True)
class Gathers:
    """All-gathers and reduce-scatters of one size.

    Attributes:
        count: How many.
        whole_bytes: Of the tensor that all ranks of the group hold together.
    """

    count: float
    whole_bytes: float

    def sent_bytes(self, ranks: int) -> float:
        """By each rank of a group."""
        return self.count * self.whole_bytes * (ranks - 1) / ranks


def once(whole_bytes: float) -> Gathers:
    """One all-gather or reduce-scatter."""
    return Gathers(count=1, whole_bytes=whole_bytes)


@dataclass(frozen=True, kw_only=True)
class BytesSent:
    """Bytes that one rank sends in one step.

    Attributes:
        expert: Rows, their weights and counts to experts on other ranks, and back.
        tensor: Activations gathered and scattered, cross-entropy, gradients of replicated weights, and
            matrices that Muon moves.
        context: Keys and values.
        pipeline: Activations and their gradients to neighbouring stages; an embedding that two stages share.
        data: Gradients reduced, weights gathered, and Muon's momenta.
        control: Losses, expert loads, the gradient norm, the stop flag.
    """

    expert: float
    tensor: float
    context: float
    pipeline: float
    data: float
    control: float

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by cause, in the order above."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def total(self) -> float:
        """All of them."""
        return math.fsum(self.parts.values())


def bytes_sent(
    job: Job, stage: int = 0, *, expert_group: Group | None = None, away: float | None = None
) -> BytesSent:
    """What a rank of a pipeline stage sends in one step, the mean over the ranks of the stage.

    Dispatchers that send a row once to a node are an expectation, without the ids and weights that go along.

    Args:
        job: Config and layout; its `plan` says what is recomputed, sharded and deduplicated.
        stage: Of the rank, from 0.
        expert_group: Nodes of the expert ranks, for a dispatcher that sends a row once to a node; by default
            all of them are in one.
        away: Share of the routed pairs that go to another rank, where a row travels for each pair; by default
            all experts are alike likely.
    """
    here, layout = stages_of(job)[stage], job.layout
    m = job.num_microbatches
    moe_layers = here.moe_layers + _mtp(job, here)
    tensor = (
        here.dense_layers * _sent(tensor_gathers(job, dense=True), layout.tp)
        + moe_layers * _sent(tensor_gathers(job, dense=False), layout.tp)
        + _sent(end_gathers(job, here), layout.tp)
    )
    split_experts = _sent(expert_tensor_gathers(job), layout.etp)
    dense_data, expert_data = data_gathers(job, here)
    muon = muon_update(job, here)
    return BytesSent(
        expert=m * moe_layers * (_layer_expert_bytes(job, expert_group, away) + split_experts)
        + once(muon.expert_matrices_bytes).sent_bytes(layout.etp),
        tensor=m * (tensor + _sent(loss_gathers(job, here), layout.tp))
        + replicated_gradients(job, here).sent_bytes(layout.tp)
        + once(muon.dense_matrices_bytes).sent_bytes(layout.tp),
        context=m * (here.dense_layers + moe_layers) * context_gathers(job).sent_bytes(layout.cp),
        pipeline=m * pipeline_sends(job, here) * pipeline_bytes(job)
        + shared_embedding(job, here).sent_bytes(2),
        data=_sent((*dense_data, once(muon.dense_momenta_bytes)), layout.dense_replicas)
        + _sent((*expert_data, once(muon.expert_momenta_bytes)), layout.edp),
        control=_control(job, here),
    )


# ---- tensor and context parallelism, a micro-batch ---------------------------------------------------------


def tensor_gathers(job: Job, *, dense: bool) -> tuple[Gathers, ...]:
    """Of one layer, forward and backward: sequence parallelism (arXiv 2205.05198, section 4.2.2).

    A block gathers its input and scatters its output; backward does the same, and gathers the input once more
    for the weight gradient.
    """
    again = 1 if "full" in job.recompute else 0
    block = Gathers(count=5 + 2 * again, whole_bytes=_stream_bytes(job))
    blocks = 1 if dense or job.shape.shared_hidden_size else 0
    return (*_attention_gathers(job, again), *[block] * blocks)


def _attention_gathers(job: Job, again: int) -> tuple[Gathers, ...]:
    """Latent attention gathers what it has compressed, of all positions of a sequence for keys and values."""
    attention, stream = job.shape.attention, _stream_bytes(job)
    if not attention.is_latent:
        return (Gathers(count=5 + 2 * again, whole_bytes=stream),)
    twice = 1 if again or "mla_up_proj" in job.recompute else 0
    queries = job.tokens * (attention.q_lora_rank or job.shape.hidden_size) * job.wide_bytes
    keys = job.tokens * job.layout.cp * job.wide_bytes
    return (
        Gathers(count=3 + twice, whole_bytes=queries),
        Gathers(count=3 + twice, whole_bytes=keys * attention.kv_lora_rank),
        Gathers(count=2 + twice, whole_bytes=keys * attention.rope_dim),  # no weight follows
        Gathers(count=2 + again, whole_bytes=stream),
    )


def end_gathers(job: Job, stage: Stage) -> tuple[Gathers, ...]:
    """Of the embedding, the output heads, and what joins the streams of MTP."""
    stream, mtp = _stream_bytes(job), _mtp(job, stage)
    heads = 1 + mtp if stage.has_head else 0
    return (
        Gathers(count=2 * (int(stage.has_embedding) + mtp), whole_bytes=stream),
        Gathers(count=3 * heads, whole_bytes=stream),
        # The join takes two streams; its output is gathered from its columns, to be split by positions.
        Gathers(count=3 * mtp, whole_bytes=2 * stream),
        Gathers(count=2 * mtp, whole_bytes=stream),
    )


def loss_gathers(job: Job, stage: Stage) -> tuple[Gathers, ...]:
    """Of the cross-entropy: maximum, sum and own logit of each token, all-reduced in fp32."""
    heads = 1 + _mtp(job, stage) if stage.has_head else 0
    return (Gathers(count=3 * ALL_REDUCE * heads, whole_bytes=job.tokens * FP32_BYTES),)


def expert_tensor_gathers(job: Job) -> tuple[Gathers, ...]:
    """Of one expert layer whose experts are split: rows gathered, partial outputs scattered, and backward.

    With the rows go the weights and expert ids of their pairs, and before them how many they are. A row
    arrives for each pair, or once for all pairs of a token here.
    """
    shape, layout = job.shape, job.layout
    forwards = 2 if {"full", "moe"} & {*job.recompute} else 1
    alone = layout.ep > 1 and job.plan.dispatcher not in DEDUPLICATING
    arriving = shape.top_k if alone else expected_distinct(shape.top_k, layout.ep)
    rows = job.tokens / layout.tp * arriving * layout.etp
    pairs = rows if alone else rows * shape.top_k
    return (
        Gathers(count=2 * (forwards + 1), whole_bytes=rows * shape.hidden_size * job.wide_bytes),
        Gathers(count=forwards + 1, whole_bytes=pairs * FP32_BYTES),
        Gathers(count=forwards, whole_bytes=pairs * INT64_BYTES),
        Gathers(count=forwards, whole_bytes=layout.etp * INT64_BYTES),
    )


def context_gathers(job: Job) -> Gathers:
    """Of one layer: keys and values, compressed in latent attention, gathered; their gradients scattered."""
    attention, layout = job.shape.attention, job.layout
    again = 1 if {"full", "core_attn"} & {*job.recompute} else 0
    if attention.is_latent:
        width = attention.kv_lora_rank + attention.rope_dim
    else:
        width = attention.num_groups * (attention.qk_dim + attention.v_dim)
    whole = job.tokens * layout.cp * width / layout.tp * job.wide_bytes
    return Gathers(count=2 + again, whole_bytes=whole)


def replicated_gradients(job: Job, stage: Stage) -> Gathers:
    """Once a step: norms, router and compressions see a part of the sequence on each tensor-parallel rank."""
    whole = sum(w.numel for w in stage_weights(job.shape, stage) if w.split == "whole")
    return Gathers(count=ALL_REDUCE, whole_bytes=whole * _gradient_bytes(job))


# ---- experts, a micro-batch --------------------------------------------------------------------------------


def exchange(job: Job, group: Group) -> Exchange:
    """One dispatch, or one combine, of a micro-batch on one rank."""
    shape = job.shape
    return Exchange(
        tokens=job.tokens / job.layout.tp,
        top_k=shape.top_k,
        row_bytes=shape.hidden_size * job.wide_bytes,
        dedup=job.plan.dispatcher in DEDUPLICATING,
        max_domains=shape.top_groups * -(-group.domains // shape.num_groups),
    )


def exchanges(job: Job) -> int:
    """Dispatches and combines of a micro-batch in one layer, forward and backward."""
    return 6 if {"full", "moe"} & {*job.recompute} else 4


def _layer_expert_bytes(job: Job, group: Group | None, away: float | None) -> float:
    """Rows; beside each that is dispatched its weight, and later that one's gradient; counts of experts."""
    ranks = job.layout.ep
    if ranks == 1:
        return 0.0
    group = group or Group(size=ranks, near=ranks)
    one = exchange(job, group)
    others = (ranks - 1) / ranks
    unevenness = 1.0 if away is None or one.dedup else away / others
    rows = exchanges(job) * sum(exchange_bytes(one, group)) * unevenness
    dispatches = exchanges(job) // 2
    weights = dispatches * one.tokens * one.top_k * others * unevenness * FP32_BYTES
    counts = (dispatches - 1) * job.shape.num_experts * INT64_BYTES * others
    return rows + weights + counts


# ---- pipeline --------------------------------------------------------------------------------------------


def pipeline_bytes(job: Job) -> float:
    """Of one transfer between stages: the residual stream of a micro-batch on one rank."""
    return _stream_bytes(job) / job.layout.tp


def pipeline_sends(job: Job, stage: Stage) -> int:
    """Transfers that a stage starts for a micro-batch: each chunk's output, and its input's gradient."""
    chunks, last = job.layout.vpp, stage.index == job.layout.pp - 1
    return 2 * chunks - int(stage.index == 0) - int(last)


def shared_embedding(job: Job, stage: Stage) -> Gathers:
    """Gradients of an embedding that the first and the last stage both hold, all-reduced once a step."""
    shape, layout = job.shape, job.layout
    held_twice = layout.pp > 1 and (shape.tied or shape.mtp_layers)
    if not held_twice or not (stage.has_embedding or stage.has_head):
        return Gathers(count=0, whole_bytes=0)
    whole = shape.vocab_size * shape.hidden_size / layout.tp * _gradient_bytes(job)
    return Gathers(count=ALL_REDUCE, whole_bytes=whole)


# ---- data parallelism ------------------------------------------------------------------------------------


def data_gathers(job: Job, stage: Stage) -> tuple[tuple[Gathers, ...], tuple[Gathers, ...]]:
    """Once a step, of dense weights and of experts: gradients scattered, then weights gathered.

    ZeRO (arXiv 1910.02054): stage 0 all-reduces gradients; 2 and 3, which keep a share of them, scatter them
    in every micro-batch (DeepSpeed, stage_1_and_2.py); 3 gathers weights in each, forward and backward.
    """
    dense, experts = held_params(job, stage)
    in_8_bits = job.precision == "mxfp8" or (job.precision == "fp8" and job.plan.is_te)
    weight_bytes = 1 if in_8_bits else job.wide_bytes
    more_bytes = router_params(job, stage) * (FP32_BYTES - weight_bytes)
    more_bytes += wide_params(job, stage) * (job.wide_bytes - weight_bytes)
    weights = (dense * weight_bytes + more_bytes, experts * weight_bytes)
    gradients = (dense * _gradient_bytes(job), experts * _gradient_bytes(job))
    zero, m = job.zero, job.num_microbatches
    reductions = {0: ALL_REDUCE, 2: m, 3: m}.get(zero, 1)
    gathers = {0: 0, 3: 2 * m}.get(zero, 1)
    of_dense, of_experts = (
        (Gathers(count=reductions, whole_bytes=gradient), Gathers(count=gathers, whole_bytes=weight))
        for gradient, weight in zip(gradients, weights, strict=True)
    )
    return of_dense, of_experts


# ---- sums over the job -----------------------------------------------------------------------------------


def _control(job: Job, stage: Stage) -> float:
    """What every rank learns of a step, and of each sequence whose positions are on several ranks."""
    shape, layout = job.shape, job.layout
    loads = (shape.num_layers + shape.mtp_layers) * shape.num_experts * INT64_BYTES
    world = Gathers(count=ALL_REDUCE, whole_bytes=STEP_SUMS_BYTES + loads)
    choices = Gathers(count=ALL_REDUCE, whole_bytes=job.micro_batch * shape.num_experts * FP32_BYTES)
    layers = (stage.moe_layers + _mtp(job, stage)) * job.num_microbatches
    return world.sent_bytes(layout.gpus) + layers * choices.sent_bytes(layout.tp * layout.cp)


def _stream_bytes(job: Job) -> float:
    """The residual stream of a micro-batch on the ranks of one tensor-parallel group."""
    return job.tokens * job.shape.hidden_size * job.wide_bytes


def _gradient_bytes(job: Job) -> int:
    return FP32_BYTES if job.plan.grads == "fp32" else 2


def _mtp(job: Job, stage: Stage) -> int:
    return job.shape.mtp_layers if stage.has_head else 0


def _sent(gathers: tuple[Gathers, ...], ranks: int) -> float:
    return sum(gather.sent_bytes(ranks) for gather in gathers)
