"""Bytes that the forward pass of a layer leaves for the backward pass, on one rank and for one micro-batch.

Families of kernels save differently (`plan.kernels`):
    ours   an expert keeps the pre-activation H, and its input X where rows came from other ranks
    torch  the same on a CPU, where a norm keeps its normalised input, too
    te     Transformer Engine: X, H and the activation A, which is the input of the down projection

T tokens, t = T / tp tokens under sequence parallelism (arXiv 2205.05198), D model, F expert hidden,
R = t * K rows of experts on a rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from moe.planner.imbalance import imbalance
from moe.planner.settings import Job

EIGHT_BITS = ("fp8", "mxfp8")
_FP32 = 4
QUANTISED_BYTES = 1 + 1 / 32  # bytes of a number with its share of a scale: 1 for 32 numbers, or 4 for 128


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Bytes by the part that saves them."""

    norms: float = 0.0
    attention: float = 0.0
    router: float = 0.0
    dispatch: float = 0.0
    experts: float = 0.0
    dense: float = 0.0


def layer_saved(job: Job, *, dense: bool) -> Saved:
    """What one layer keeps; with full recomputation only its input."""
    if "full" in job.recompute:
        return Saved(norms=_stream(job))
    if dense:
        return Saved(norms=2 * _norm(job), attention=_attention(job), dense=_dense(job))
    return Saved(
        norms=2 * _norm(job),
        attention=_attention(job),
        router=_router(job),
        dispatch=_dispatch(job),
        experts=_experts(job),
        dense=_shared(job),
    )


def join_saved(job: Job) -> float:
    """What a prediction depth keeps of the two streams that it joins, unless it is recomputed whole."""
    return 0.0 if "full" in job.recompute else 2 * (_norm(job) + _stream(job))


def materialised_share(job: Job) -> float:
    """Share of the layers that make all weights of attention: no kernel of torch knows sinks or windows."""
    attention, shape = job.shape.attention, job.shape
    if job.plan.is_te or not (attention.sinks or attention.window):
        return 0.0
    if attention.sinks or not attention.full_every:
        return 1.0
    return 1 - shape.num_layers // attention.full_every / shape.num_layers


def attention_weights(job: Job) -> float:
    """Weights of attention for a token, on a rank: of all its heads for all keys and the sink."""
    attention = job.shape.attention
    return attention.num_heads / job.layout.tp * (job.seq_length + int(attention.sinks))


def logits_bytes(job: Job) -> float:
    """The final norm, the output head's logits, and the fp32 copy that cross entropy turns into softmax."""
    copied = job.plan.cross_entropy != "in_place" and job.precision != "fp32"
    logits = job.tokens * job.shape.vocab_size / job.layout.tp
    return _norm(job) + logits * (job.wide_bytes + (_FP32 if copied else 0))


def graph_bytes(job: Job) -> float:
    """Buffers of a layer's recorded launches, which stay in place beside what is saved anyway.

    The part from norm to router takes the residual stream and returns it, normalised and as it was;
    megatron-core keeps the gradients of all three. A graph of the whole step needs none between layers.
    """
    return 3 * _stream(job) if job.plan.cuda_graph == "partial" else 0.0


def workspace_bytes(job: Job, *, dense: bool) -> float:
    """The most that lives at once in the backward pass of one layer, beside what its forward pass saved.

    That is what is computed again, with the gradients of rows of experts and of what these save, or with
    those of attention. Parts that are computed again one by one are not there together, a whole layer is.
    """
    saved, whole = layer_saved(job, dense=dense), layer_saved(replace(job, recompute=()), dense=dense)
    again = {one.name: max(0.0, getattr(whole, one.name) - getattr(saved, one.name)) for one in fields(Saved)}
    again_bytes: float = sum(again.values())
    of_attention = again_bytes if "full" in job.recompute else again["attention"]
    of_experts = again_bytes if "full" in job.recompute else again_bytes - again["attention"]
    weights = attention_weights(job) if materialised_share(job) else 0.0
    attention = of_attention + 2 * job.tokens * weights * _FP32
    return max(attention, of_experts + _expert_gradients(job))


def _expert_gradients(job: Job) -> float:
    """Of rows of experts and what they save; in 8 bits also of their weights, beside quantised weights."""
    D, F = job.shape.hidden_size, job.shape.expert_hidden_size / job.layout.etp
    rows = _rows(job) * job.wide_bytes * (2 * D + 3 * F)
    if job.plan.is_te or job.expert_precision not in EIGHT_BITS:
        return rows
    weights = job.shape.num_experts / job.layout.ep * D * F
    quantised = 2 if job.wide_into_activation else 3  # the down projection's gradient needs it wide
    return rows + weights * (3 * job.wide_bytes + quantised * QUANTISED_BYTES)


def keeps_one_copy(job: Job, precision: str) -> bool:
    """Whether 8-bit operands need no second copy, by columns: Transformer Engine, a scale a tensor, new GPUs.

    From compute capability 10 on, the first that knows MXFP8, 8-bit products take columns, too
    (is_non_tn_fp8_gemm_supported).
    """
    return precision == "fp8" and job.plan.is_te and "mxfp8" in job.gpu.peak_flops


def _operand_bytes(job: Job, precision: str) -> float:
    """Bytes of a GEMM's saved input: quantised ones are kept quantised, MXFP8 with a scale for 32 numbers."""
    return {"fp8": 1.0, "mxfp8": QUANTISED_BYTES}.get(precision, job.wide_bytes)


def _attention_operand_bytes(job: Job) -> float:
    """Bytes of a query, key or value that attention keeps; its output stays wide.

    Transformer Engine keeps 8-bit ones for its backward pass, MXFP8's by rows and by columns (backends.py).
    """
    if not job.plan.fp8_attention:
        return job.wide_bytes
    return 2 * QUANTISED_BYTES if job.precision == "mxfp8" else 1


def _stream(job: Job) -> float:
    """The residual stream at one place."""
    return job.tokens / job.layout.tp * job.shape.hidden_size * job.wide_bytes


def _norm(job: Job) -> float:
    """Input and output, which is the input of GEMMs and goes with recomputation; on a CPU one more."""
    output = 0.0 if "layernorm" in job.recompute else _operand_bytes(job, job.precision) / job.wide_bytes
    return _stream(job) * (1 + output + (job.plan.kernels == "torch"))


def _attention(job: Job) -> float:
    """Queries, keys, values, the output and its softmax statistics; what leads to them unless recomputed."""
    attention, layout, T = job.shape.attention, job.layout, job.tokens
    H, groups, wide = attention.num_heads / layout.tp, attention.num_groups / layout.tp, job.wide_bytes
    q, k, v = H * attention.qk_dim, groups * attention.qk_dim, groups * attention.v_dim
    narrow = _attention_operand_bytes(job)
    # Wide in 8 bits, too: Megatron-Core has the projection keep no quantised copy (save_original_input).
    output = H * (attention.v_dim * wide + _FP32)
    if "core_attn" in job.recompute:  # from the projections on; the output is the next one's input
        inputs = q + k + v if not attention.is_latent else _compressed(job, copies=1, key_ranks=1) / layout.tp
        return T * (inputs + H * attention.v_dim) * wide
    # Under context parallelism the outputs of two pieces of a sequence are joined for the projection.
    output += H * attention.v_dim * wide if job.key_ranks > 1 else 0
    if not attention.is_latent:
        return T * _grouped(job, q, k, v, output)
    copies, ranks = 3 if job.plan.kernels == "torch" else 2, job.key_ranks
    kept = T / layout.tp * _compressed(job, copies=copies, key_ranks=ranks) * wide + T * output
    if "mla_up_proj" in job.recompute:
        return kept
    # Megatron-Core's fused rotation writes keys and values apart, so their projection goes.
    nope_dim = 0 if job.plan.is_te else attention.qk_dim - attention.rope_dim
    return kept + T * ((q + ranks * (k + v)) * narrow + ranks * groups * nope_dim * wide)


def _grouped(job: Job, q: float, k: float, v: float, output: float) -> float:
    """Bytes for a token, from the projection on; q, k, v numbers of its heads, `output` bytes."""
    attention, wide = job.shape.attention, job.wide_bytes
    normed = q + (q + k if job.plan.kernels == "torch" else 0)  # a norm keeps its queries apart
    normed = 0 if attention.qk_norm == "none" else normed
    # Values stay a part of the projection's output, so all of that stays; gathered ones are apart, and so are
    # Transformer Engine's, which it makes contiguous (get_qkv_layout).
    is_apart = job.key_ranks > 1 or job.plan.is_te
    projected = normed + (q + k + v if normed or not is_apart else 0)
    keys, values = job.key_ranks * k, job.key_ranks * v if is_apart else 0
    narrow = _attention_operand_bytes(job)
    fused = projected * wide + (q + keys + values) * narrow + output
    share = materialised_share(job)
    if not share:
        return fused
    # In fp32, weights and operands; values that are so already are counted above.
    operands = q + keys + (0 if job.precision == "fp32" else job.key_ranks * v)
    own_values = values if job.precision == "fp32" else 0
    made = (projected + own_values + attention.num_heads / job.layout.tp * attention.v_dim) * wide
    made += (operands + attention_weights(job)) * _FP32
    return share * made + (1 - share) * fused


def _compressed(job: Job, *, copies: int, key_ranks: int) -> float:
    """Numbers a token that latent attention keeps: compressions before and after their norms."""
    attention = job.shape.attention
    keys = copies * attention.kv_lora_rank + attention.rope_dim
    return copies * attention.q_lora_rank + key_ranks * keys


def _router(job: Job) -> float:
    """Logits and scores in fp32, and the choice."""
    return job.tokens / job.layout.tp * (2 * job.shape.num_experts * _FP32 + job.shape.top_k * 16)


def _rows(job: Job) -> float:
    """Rows of the busiest rank's experts."""
    return job.tokens / job.layout.tp * job.shape.top_k * job.layout.etp * imbalance(job)


def _dispatch(job: Job) -> float:
    """Weights and maps from pairs to rows and back, once more where rows travel."""
    return _rows(job) * (16 + _FP32) * (1 if job.layout.expert_ranks == 1 else 2)


def _experts(job: Job) -> float:
    """X, H, and what the family of kernels keeps beside them."""
    D, F = job.shape.hidden_size, job.shape.expert_hidden_size / job.layout.etp
    if "moe" in job.recompute:
        return 0.0
    # Ours gathers X in the GEMM where rows are tokens: the norm's output, or what ranks that split experts
    # sent.
    gathers = not job.plan.is_te and job.layout.ep == 1
    of_tokens = D / job.shape.top_k if job.layout.etp > 1 else 0
    keeps_activation = job.plan.is_te and "moe_act" not in job.recompute
    operands = (of_tokens if gathers else D) + (F if keeps_activation else 0)
    # Ours quantises X along other dimensions in the backward, so it keeps X as it came.
    operand = _operand_bytes(job, job.expert_precision) if job.plan.is_te else job.wide_bytes
    inputs = QUANTISED_BYTES if job.fp8_input_store else job.wide_bytes
    # Clamped apart, gate and up are there as they came and as they were clamped.
    clamped = job.plan.kernels == "te" and job.shape.expert_bias and keeps_activation
    return _rows(job) * (operands * operand + 2 * F * (inputs + (job.wide_bytes if clamped else 0)))


def _shared(job: Job) -> float:
    if "shared_experts" in job.recompute:
        return 0.0
    return _swiglu(job, job.shape.shared_hidden_size)


def _dense(job: Job) -> float:
    return 0.0 if "mlp" in job.recompute else _swiglu(job, job.shape.ffn_hidden_size)


def _swiglu(job: Job, hidden: int) -> float:
    """Gate, up and the activation; without fusion silu(gate) and a copy of up. The norm saved the input."""
    unfused = 0 if job.plan.is_te else 2 * job.wide_bytes
    per_number = 2 * job.wide_bytes + _operand_bytes(job, job.precision) + unfused
    return job.tokens * hidden / job.layout.tp * per_number
