"""What fused attention computes and streams, and what it costs to rotate heads.

T tokens of a micro-batch on a rank, H heads of it, s positions. Measured where cuDNN's are: NVIDIA
cudnn-frontend 1.20 and 1.23, benchmark/sdpa_benchmark_training/results.
"""

from __future__ import annotations

from dataclasses import replace

from moe.counts.counts import attention_products
from moe.planner.settings import Job

# Queries of a tile see the keys of its first and of its last one: a tile more than the window.
TILE = 128
# Times that a number of a head is read or written, forward and backward, by a kernel of its own, and where
# a scale of the rotation (YaRN's) keeps Megatron-Core 0.16.1 from that kernel: two products, with cosine and
# sine, halves negated and joined, a sum, a copy; then their gradients (embeddings/rope_utils.py).
FUSED_ROTATION = (2, 3)
UNFUSED_ROTATION = (12, 14)
FUSED_LAUNCHES = (1, 1)
UNFUSED_LAUNCHES = (6, 8)


def head_moves(job: Job) -> tuple[tuple[int, int], tuple[int, int]]:
    """How heads are split to contiguous ones, rotated and, in some models, normed, forward and backward.

    Returns:
        Times that queries and keys are read or written, and kernels for both.
    """
    attention = job.shape.attention
    alike = 1 + (attention.qk_norm != "none")
    unfused = job.plan.is_te and attention.rotation_scaled and not attention.is_latent
    moves = UNFUSED_ROTATION if unfused else FUSED_ROTATION
    launches = UNFUSED_LAUNCHES if unfused else FUSED_LAUNCHES
    return (
        (2 * alike + moves[0], 3 * alike + moves[1]),
        (2 * (alike + launches[0]), 2 * (alike + launches[1])),
    )


def fused_products(job: Job, *, share: float, backward: bool) -> float:
    """Multiplications of one query-key and one value product on a rank, the mean of all layers.

    Windowed layers compute whole tiles. The backward pass with 8-bit operands computes all keys: cuDNN 9.19
    and 9.22 take four times as long for twice the positions, whatever the window.

    Args:
        job: For sizes.
        share: Of the layers; the others make their weights, so those here see all positions.
        backward: Of the backward pass.
    """
    shape = job.shape
    window = shape.attention.window
    if share < 1 or (backward and job.plan.fp8_attention):
        window = 0
    elif window:
        window += TILE
    shape = replace(shape, attention=replace(shape.attention, window=window))
    layers = shape.num_layers + shape.mtp_layers
    return share * attention_products(shape, job.seq_length) / layers * job.tokens / job.layout.tp


def streamed_bytes(job: Job) -> tuple[float, float]:
    """Bytes that the kernels of fused attention move in a layer, forward and backward.

    Forward reads queries, keys and values and writes the output; backward reads all four and the output's
    gradient and writes three gradients. 8-bit operands are first read, written and read again.
    """
    attention, T, wide = job.shape.attention, job.tokens, job.wide_bytes
    H, groups = attention.num_heads / job.layout.tp, attention.num_groups / job.layout.tp
    operands = T * (H * attention.qk_dim + job.key_ranks * groups * (attention.qk_dim + attention.v_dim))
    output = T * H * attention.v_dim
    first, again = (wide + 2, 1) if job.plan.fp8_attention else (wide, wide)
    forward = operands * first + output * wide
    backward = operands * (again + wide) + output * (wide + first)
    return forward, backward
