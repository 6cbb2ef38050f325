"""The kernels of one micro-batch, forward and backward: FLOPs, bytes, launches.

Everything is per rank. T tokens of a micro-batch, D model, F expert hidden, E experts, K top-k, H heads,
R = T / tp * K rows that experts compute on a rank when loads are even.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from moe.planner.activations import (
    EIGHT_BITS,
    QUANTISED_BYTES,
    attention_weights,
    keeps_one_copy,
    materialised_share,
)
from moe.planner.attention import TILE, fused_products, head_moves, streamed_bytes
from moe.planner.op import Op, with_one_wide
from moe.planner.settings import Job

# Bytes moved for a logit, forward and backward. In place: read and written in 16 bits. Fused: a copy in
# fp32 is made, exponentiated and read. Unfused: maximum, difference, exponential, sum and gradient are
# passes of fp32.
CROSS_ENTROPY_BYTES = {"in_place": (6, 4), "fused": (14, 10), "unfused": (34, 18)}
# Bytes moved for a weight of attention that is made, forward and backward: written, masked, normalised and
# read in fp32.
ATTENTION_WEIGHT_BYTES = (24, 28)
# Bytes moved for a number of experts, forward and backward, where nothing is fused (megatron-core 0.16.1,
# transformer/moe/experts.py). Biased output: the bias times a weight, the sum, all experts joined, each in
# fp32, and a cast; their gradients. Gate and up: clamped apart and joined. 8-bit rows and their outputs:
# copied, so that each expert has a multiple of 16 or 32, and back.
UNFUSED_BIAS_BYTES = (28, 40)
UNFUSED_CLAMP_BYTES = (8, 10)
UNFUSED_PADDING_BYTES = (8, 8)
UNFUSED_BIAS_LAUNCHES = 3  # for each expert
UNFUSED_CLAMP_LAUNCHES = 3


def layer_ops(job: Job, *, dense: bool) -> list[Op]:
    """The kernels of one transformer layer."""
    feed_forward = _dense_ops(job) if dense else _moe_ops(job)
    return [*_norm_ops(job), *_attention_ops(job), *feed_forward]


def head_ops(job: Job) -> list[Op]:
    """Final norm, output head and cross entropy; MTP has its own pass through them."""
    T, V, tp = job.tokens, job.shape.vocab_size, job.layout.tp
    logits = T * V / tp
    forward, backward = CROSS_ENTROPY_BYTES[job.plan.cross_entropy]
    loss = _memory("cross entropy", "", forward * logits, backward * logits, launches=4)
    precision = "" if job.plan.fp8_head or job.precision not in EIGHT_BITS else "bf16"
    return [*_linear(job, "head", T, V // tp, job.shape.hidden_size, precision=precision), loss]


def embedding_ops(job: Job) -> list[Op]:
    """Gather forward, scatter-add backward."""
    moved = job.tokens / job.layout.tp * job.shape.hidden_size * job.wide_bytes
    return [Op(name="embedding", kind="memory", bytes=2 * moved, backward_bytes=3 * moved)]


def mtp_ops(job: Job) -> list[Op]:
    """What a prediction depth has beside an expert layer: the projection of two streams, the head again."""
    D, T, tp = job.shape.hidden_size, job.tokens, job.layout.tp
    join = _linear(job, "mtp projection", T, D // tp, 2 * D)
    return [*join, *head_ops(job)]


def _memory(
    name: str, part: str, forward: float, backward: float, *, launches: int = 1, backward_launches: int = 2
) -> Op:
    """A streaming kernel: bytes forward and backward."""
    return Op(
        name=name,
        kind="memory",
        part=part,
        bytes=forward,
        backward_bytes=backward,
        launches=launches,
        backward_launches=backward_launches,
    )


def _linear(
    job: Job,
    name: str,
    M: float,
    N: float,
    K: float,
    *,
    part: str = "",
    groups: int = 1,
    of_experts: bool = False,
    precision: str = "",
) -> list[Op]:
    """A GEMM [M, K] x [K, N], and the quantisation of its operands if they have 8 bits.

    Args:
        job: For precisions.
        name: Of the op.
        M: Rows over all groups.
        N: Columns.
        K: Inner length.
        part: What recomputation calls it.
        groups: Experts, each with a weight of its own.
        of_experts: Grows with the load of the busiest rank.
        precision: Of the operands; empty is the job's.
    """
    precision = precision or job.precision
    fp8, wide = precision in EIGHT_BITS, job.wide_bytes
    kernels = groups if job.plan.kernels == "te" else 1  # unfused, each expert has its own
    operand = 1 if fp8 else wide
    weight = groups * K * N
    # A dense model is one expert of all rows.
    in_tiles = _rows_in_tiles(M, groups) if of_experts and job.shape.num_experts > 1 else M
    gemm = Op(
        name=name,
        kind="gemm",
        part=part,
        flops=2 * in_tiles * N * K,
        bytes=operand * (M * K + weight) + wide * M * N,
        backward_flops=4 * in_tiles * N * K,
        # Input gradient: dY, W in, dX out. Weight gradient: dY, X in.
        backward_bytes=operand * (2 * M * N + weight + M * K)
        + wide * M * K
        + weight * _gradient_bytes(job, of_experts=of_experts, fp8=fp8),
        launches=kernels,
        backward_launches=2 * kernels,
        of_experts=of_experts,
        precision=precision,
    )
    if not fp8:
        return [gemm]
    per_number = _quantize_bytes(job, precision)
    forward, backward = M * K * per_number, M * N * per_number
    passes = kernels * (2 if precision == "fp8" else 1)
    quantize = _memory(f"quantize {name}", part, forward, backward, launches=passes, backward_launches=passes)
    ops = [gemm, replace(quantize, of_experts=of_experts)]
    if not job.plan.is_te:
        # Read, written in 8 bits with scales: along one dimension forward, along the other backward.
        moved = weight * (wide + QUANTISED_BYTES)
        ops.append(_memory(f"quantize weights of {name}", part, moved, moved, backward_launches=1))
    return ops


def _rows_in_tiles(rows: float, groups: int) -> float:
    """Of whole tiles: the last one of an expert is half full on average, and one that has rows has a tile."""
    with_rows = min(groups, rows)
    return max(rows + with_rows * (TILE - 1) / 2, with_rows * TILE)


def _gradient_bytes(job: Job, *, of_experts: bool, fp8: bool) -> int:
    """Bytes moved to accumulate the gradient of a weight.

    Transformer Engine's products and those of our wide experts add to the gradient buffer. All else writes a
    gradient of its own, which is read and added.
    """
    gradient = 4 if job.plan.grads == "fp32" else 2
    adds = job.plan.is_te or (of_experts and not fp8)
    return 2 * gradient + (0 if adds else 2 * job.wide_bytes)


def _quantize_bytes(job: Job, precision: str) -> float:
    """Bytes that quantising a number moves: written by rows and, if need be, by columns for its two products.

    A scale for a whole tensor needs a pass of its own to find the largest number. Fused into the kernel that
    makes the tensor, two writes of 8 bits replace that kernel's one of 16; a byte stands for scales and for
    what a kernel with two results loses.
    """
    if job.plan.kernels == "te_fused":
        return 1
    return (2 if precision == "fp8" else 1) * job.wide_bytes + (1 if keeps_one_copy(job, precision) else 2)


def _norm_ops(job: Job) -> Iterator[Op]:
    """Two norms and two residual sums over the tokens of this rank."""
    moved = job.tokens / job.layout.tp * job.shape.hidden_size * job.wide_bytes
    yield _memory("layer norms", "layernorm", 2 * 2 * moved, 2 * 4 * moved, launches=2, backward_launches=4)
    # Megatron-Core adds the output's bias apart where experts have biases, too (TEGroupedMLP).
    bias = job.plan.is_te and job.shape.attention.out_bias and job.shape.expert_bias
    yield _memory("residuals", "", (6 + 2 * bias) * moved, (4 + bias) * moved, launches=2 + bias)


def _attention_ops(job: Job) -> Iterator[Op]:
    attention, T, tp = job.shape.attention, job.tokens, job.layout.tp
    D, H = job.shape.hidden_size, attention.num_heads / tp
    groups = attention.num_groups / tp
    wide, all_keys = job.wide_bytes, job.key_ranks
    if attention.is_latent:
        yield from _latent_ops(job)
    else:
        qkv = H * attention.qk_dim + groups * (attention.qk_dim + attention.v_dim)
        yield from _linear(job, "qkv", T, qkv, D)
    # Keys of grouped attention travel once they are rotated, compressions of latent attention before.
    q_and_k = T * (H + groups * (all_keys if attention.is_latent else 1)) * attention.qk_dim * wide
    yield _heads_op(job, q_and_k)
    share = materialised_share(job)
    if share < 1:
        yield _fused_attention(job, 1 - share)
    if share > 0:
        yield from _materialised_ops(job, share)
    yield from _linear(job, "attention out", T, D, H * attention.v_dim)


def _heads_op(job: Job, q_and_k: float) -> Op:
    """Queries and keys are split to contiguous heads, rotated and, if the model does so, normed.

    Args:
        job: For the family of kernels.
        q_and_k: Their bytes.
    """
    (forward, backward), (launches, backward_launches) = head_moves(job)
    return _memory(
        "rotate and norm heads",
        "mla_up_proj" if job.shape.attention.is_latent else "" if job.plan.is_te else "core_attn",
        forward * q_and_k,
        backward * q_and_k,
        launches=launches,
        backward_launches=backward_launches,
    )


def _fused_attention(job: Job, share: float) -> Op:
    """Two products forward, five backward: the query-key product is computed again (arXiv 2205.14135).

    Args:
        job: For sizes.
        share: Of the layers; the others make their weights.
    """
    attention = job.shape.attention
    forward, backward = streamed_bytes(job)
    return Op(
        name="attention",
        kind="attention",
        part="core_attn",
        flops=2 * fused_products(job, share=share, backward=False),
        bytes=share * forward,
        head_dim=(attention.qk_dim + attention.v_dim) / 2,
        backward_flops=5 * fused_products(job, share=share, backward=True),
        backward_bytes=share * backward,
        precision="fp8" if job.plan.fp8_attention else "bf16",
    )


def _materialised_ops(job: Job, share: float) -> Iterator[Op]:
    """The whole square of every head, masked afterwards, in fp32; in a share of the layers."""
    attention, weights = job.shape.attention, share * job.tokens * attention_weights(job)
    flops = 2 * weights * (attention.qk_dim + attention.v_dim)
    yield Op(
        name="attention",
        kind="gemm",
        part="core_attn",
        flops=flops,
        backward_flops=2 * flops,
        launches=2,
        backward_launches=4,
        precision="fp32",
    )
    forward, backward = (weights * moved for moved in ATTENTION_WEIGHT_BYTES)
    yield _memory("attention weights", "core_attn", forward, backward, launches=3, backward_launches=3)


def _latent_ops(job: Job) -> Iterator[Op]:
    """Compression on the tokens of this rank, projections to its heads on all tokens of the group."""
    attention, T, tp, D = job.shape.attention, job.tokens, job.layout.tp, job.shape.hidden_size
    H, wide = attention.num_heads / tp, job.wide_bytes
    if attention.q_lora_rank:
        yield from _linear(job, "q down", T / tp, attention.q_lora_rank, D)
    yield from _linear(job, "kv down", T / tp, attention.kv_lora_rank + attention.rope_dim, D)
    compressed = T / tp * (attention.q_lora_rank + attention.kv_lora_rank * job.key_ranks) * wide
    up = "mla_up_proj"
    yield _memory("latent norms", up, 2 * compressed, 4 * compressed, launches=2, backward_launches=4)
    yield from _linear(job, "q up", T, H * attention.qk_dim, attention.q_lora_rank or D, part=up)
    kv = attention.qk_dim - attention.rope_dim + attention.v_dim
    yield from _linear(job, "kv up", T * job.key_ranks, H * kv, attention.kv_lora_rank, part=up)


def _dense_ops(job: Job) -> Iterator[Op]:
    yield from _swiglu(job, "dense mlp", job.tokens, job.shape.ffn_hidden_size / job.layout.tp, part="mlp")


def _swiglu(
    job: Job,
    name: str,
    rows: float,
    hidden: float,
    *,
    part: str,
    groups: int = 1,
    of_experts: bool = False,
) -> Iterator[Op]:
    """Gate and up in one GEMM, the activation, down."""
    D, precision = job.shape.hidden_size, job.expert_precision if of_experts else ""
    linear = partial(_linear, job, part=part, groups=groups, of_experts=of_experts, precision=precision)
    up, down = linear(f"{name} up", rows, 2 * hidden, D), linear(f"{name} down", rows, D, hidden)
    if of_experts and job.wide_into_activation:
        weight = groups * D * hidden
        up = with_one_wide(job, up, (rows * D, 2 * weight), backward=False)
        down = with_one_wide(job, down, (rows * D, weight), backward=True)
    yield from up
    moved = rows * hidden * job.wide_bytes
    # Fused: reads gate and up, writes the product. Ours fuses in experts only: silu, a copy of up, product.
    forward, backward = (3, 5) if job.plan.is_te or of_experts else (7, 12)
    act_part = "moe_act" if of_experts else part
    act = _memory(f"{name} act", act_part, forward * moved, backward * moved, backward_launches=1)
    yield replace(act, of_experts=of_experts)
    yield from down


def _moe_ops(job: Job) -> Iterator[Op]:
    shape, layout, T = job.shape, job.layout, job.tokens
    D, E, wide = shape.hidden_size, shape.num_experts, job.wide_bytes
    local = T / layout.tp
    rows = local * shape.top_k
    yield _router_op(job, local)
    index = _memory("top-k and index", "router", local * E * 16, local * E * 12, launches=8)
    yield replace(index, backward_launches=6)
    # Rows are sorted by destination and, on arrival, by expert. A fused dispatcher does the first, and our
    # experts the second: they gather as they multiply.
    sorts = 1 if job.plan.dispatcher in ("deepep", "hybridep") or layout.ep == 1 else 2
    sorts -= 0 if job.plan.is_te else 1
    row_bytes = rows * layout.etp * D * wide
    moved = 2 * sorts * row_bytes
    permute = _memory("permute", "", moved, moved, launches=3 * sorts, backward_launches=sorts)
    yield replace(permute, of_experts=True)
    yield from _swiglu(
        job,
        "experts",
        rows * layout.etp,
        shape.expert_hidden_size / layout.etp,
        part="moe",
        groups=E // layout.ep,
        of_experts=True,
    )
    # HybridEP writes rows where experts want them.
    pads = job.plan.kernels == "te" and job.plan.dispatcher != "hybridep" and E > 1
    if pads and job.expert_precision in EIGHT_BITS:
        padded = (row_bytes / wide * moved for moved in UNFUSED_PADDING_BYTES)
        yield replace(_memory("pad", "moe", *padded, launches=2), of_experts=True)
    if shape.expert_bias:
        yield from _bias_ops(job, rows * layout.etp)
    yield _memory("combine", "", (sorts + 1) * row_bytes, (sorts + 1) * row_bytes, launches=2 * sorts)
    if shape.shared_hidden_size:
        width = shape.shared_hidden_size / layout.tp
        yield from _swiglu(job, "shared expert", T, width, part="shared_experts")


def _router_op(job: Job, tokens: float) -> Op:
    """A product in fp32, for which ours makes a copy of its input, forward and backward."""
    D, E, wide = job.shape.hidden_size, job.shape.num_experts, job.wide_bytes
    copied = 2 * 4 if wide == 2 and not job.plan.is_te else 0
    return Op(
        name="router",
        kind="gemm",
        part="router",
        flops=2 * tokens * D * E,
        bytes=tokens * (D * (wide + copied) + E * 4),
        backward_flops=4 * tokens * D * E,
        backward_bytes=tokens * (D * (2 * wide + copied) + 2 * E * 4),
        launches=3,
        precision="bf16" if job.plan.is_te and job.precision != "fp32" else "fp32",
    )


def _bias_ops(job: Job, rows: float) -> Iterator[Op]:
    """Biases of experts and the clamps that go with them; fused, only sums of gradients read rows again."""
    outputs, hidden = rows * job.shape.hidden_size, rows * 2 * job.shape.expert_hidden_size / job.layout.etp
    if job.plan.kernels == "te":
        clamps = (hidden * moved for moved in UNFUSED_CLAMP_BYTES)
        clamp = _memory("clamp", "moe_act", *clamps, launches=UNFUSED_CLAMP_LAUNCHES)
        yield replace(clamp, of_experts=True)
        forward, backward = (outputs * moved for moved in UNFUSED_BIAS_BYTES)
        launches = UNFUSED_BIAS_LAUNCHES * job.shape.num_experts // job.layout.ep
    else:
        forward, backward, launches = 0.0, (outputs + hidden) * job.wide_bytes, 1
    op = _memory("expert biases", "moe", forward, backward, launches=launches, backward_launches=2 * launches)
    yield replace(op, of_experts=True)
