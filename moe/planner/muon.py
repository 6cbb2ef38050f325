"""What Muon adds to a step: momenta gathered, matrices joined, Newton-Schulz iterations (moe/optim/muon.py).

A rank keeps the momentum of its share of a buffer and needs whole matrices, so it gathers the buffer over
data-parallel ranks; of split matrices, those that its share touches over the ranks that split them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moe.counts.shape import Attention, Shape
from moe.counts.weights import Split
from moe.planner.settings import Job
from moe.planner.stages import Stage, held_params, router_params

STEPS = 5  # of Newton-Schulz, as in moe/optim/orthogonal.py


@dataclass(frozen=True)
class Parameter:
    """A parameter that Muon moves, several of them alike.

    Attributes:
        matrices: (rows, columns) of those that lie in it; whole, over all ranks that split it.
        split: How ranks divide it.
        count: Of a layer; of experts, all.
    """

    matrices: tuple[tuple[int, int], ...]
    split: Split = "tp"
    count: int = 1

    @property
    def numel(self) -> int:
        """Numbers of one, over all ranks that split it."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def flops(self) -> int:
        """To orthogonalise one: a product with itself, that with itself, and one more, in each step."""
        sides = [(min(matrix), max(matrix)) for matrix in self.matrices]
        return STEPS * sum(4 * n * n * m + 2 * n**3 for n, m in sides)


@dataclass(frozen=True, kw_only=True)
class Update:
    """Of one rank in one step, the mean over the ranks of a stage.

    Attributes:
        dense_momenta_bytes: Gathered over data-parallel ranks, of all dense parameters.
        expert_momenta_bytes: Of experts, over their replicas.
        dense_matrices_bytes: Gathered over tensor-parallel ranks, of the matrices that its share touches.
        expert_matrices_bytes: Of experts, over the ranks that split each.
        flops: Of the iterations.
    """

    dense_momenta_bytes: float = 0.0
    expert_momenta_bytes: float = 0.0
    dense_matrices_bytes: float = 0.0
    expert_matrices_bytes: float = 0.0
    flops: float = 0.0


def muon_update(job: Job, stage: Stage) -> Update:
    """What the update of a stage's matrices takes; nothing where AdamW moves all."""
    if not job.muon:
        return Update()
    layout, wide = job.layout, job.wide_bytes
    dense, experts = _held(job, stage)
    dense_replicas, expert_replicas = (layout.dense_replicas, layout.edp) if job.zero else (1, 1)
    dense_momenta_bytes, expert_momenta_bytes = momenta_bytes(job, stage)
    # Of dense matrices each rank that splits one has a part; of experts E / ep whole or split ones.
    shares = {
        "tp": (dense_replicas, dense, layout.tp),
        "whole": (dense_replicas, dense, 1),
        "expert": (expert_replicas, experts, layout.etp),
    }
    gathered = {"tp": 0.0, "whole": 0.0, "expert": 0.0}
    flops = 0.0
    for parameter in filter(lambda one: one.count, _parameters(job.shape, stage)):
        replicas, held, split = shares[parameter.split]
        here = parameter.count / (layout.ep if parameter.split == "expert" else 1)
        touched = here * _touched(parameter.numel / split, replicas, held)
        gathered[parameter.split] += touched * parameter.numel * wide
        flops += touched * parameter.flops
    return Update(
        dense_momenta_bytes=dense_momenta_bytes,
        expert_momenta_bytes=expert_momenta_bytes,
        dense_matrices_bytes=gathered["tp"],
        expert_matrices_bytes=gathered["expert"],
        flops=flops,
    )


def momenta_bytes(job: Job, stage: Stage) -> tuple[float, float]:
    """(dense, expert) momenta that are gathered whole, one after the other; none if no states are shared."""
    if not job.muon or job.zero == 0:
        return 0.0, 0.0
    dense, experts = _held(job, stage)
    return dense * job.wide_bytes, experts * job.wide_bytes


def _held(job: Job, stage: Stage) -> tuple[int, int]:
    """Numbers in the buffers that have matrices; routers in fp32 beside bf16 have one of their own."""
    dense, experts = held_params(job, stage)
    return dense - (router_params(job, stage) if job.precision != "fp32" else 0), experts


def _touched(numel: float, ranks: int, held: int) -> float:
    """Share of the ranks whose part of a buffer has some of a parameter: ranks - 1 cuts fall anywhere."""
    return (1 + (ranks - 1) * numel / held) / ranks


def _parameters(shape: Shape, stage: Stage) -> Iterator[Parameter]:
    D = shape.hidden_size
    mtp = shape.mtp_layers if stage.has_head else 0
    dense, moe = stage.dense_layers, stage.moe_layers + mtp
    for parameter in _attention(shape.attention, D):
        yield _times(parameter, dense + moe)
    yield from (_times(one, dense) for one in _swiglu(D, shape.ffn_hidden_size, "tp"))
    yield from (
        _times(one, moe * shape.num_experts) for one in _swiglu(D, shape.expert_hidden_size, "expert")
    )
    if shape.shared_hidden_size:
        yield from (_times(one, moe) for one in _swiglu(D, shape.shared_hidden_size, "tp"))
    yield Parameter(((D, 2 * D),), count=mtp)


def _times(parameter: Parameter, count: int) -> Parameter:
    return Parameter(parameter.matrices, parameter.split, count)


def _swiglu(hidden_size: int, inner: int, split: Split) -> tuple[Parameter, Parameter]:
    """Gate and up in one parameter, and down."""
    up = (inner, hidden_size)
    return Parameter((up, up), split), Parameter(((hidden_size, inner),), split)


def _attention(attention: Attention, hidden_size: int) -> Iterator[Parameter]:
    D, H, groups = hidden_size, attention.num_heads, attention.num_groups
    yield Parameter(((D, H * attention.v_dim),))
    if not attention.is_latent:
        q, k, v = H * attention.qk_dim, groups * attention.qk_dim, groups * attention.v_dim
        yield Parameter(((q, D), (k, D), (v, D)))
        return
    nope, rope, c = attention.qk_dim - attention.rope_dim, attention.rope_dim, attention.kv_lora_rank
    inner = attention.q_lora_rank or D
    yield Parameter(((H * nope, inner), (H * rope, inner)))
    if attention.q_lora_rank:
        yield Parameter(((attention.q_lora_rank, D),), "whole")
    yield Parameter(((c, D), (rope, D)), "whole")
    yield Parameter(((H * nope, c), (H * attention.v_dim, c)))
