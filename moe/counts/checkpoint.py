"""What a checkpoint takes, on disk and in the memory of hosts while it is written."""

from __future__ import annotations

from moe.config.schema import ParallelSection, RunConfig
from moe.counts.counts import all_weights, params_on_rank, params_total
from moe.counts.shape import Shape, shape_of
from moe.counts.stages import Stage, chunk_layers, split_stages, stage_parts

FP32_BYTES = 4
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}  # of train.precision


def run_checkpoint_bytes(config: RunConfig) -> int:
    """Size on disk of a checkpoint of a run."""
    return checkpoint_bytes(
        shape_of(config.model),
        weight_bytes=WEIGHT_BYTES[config.train.precision],
        muon=config.optim.name == "muon",
    )


def checkpoint_bytes(shape: Shape, *, weight_bytes: int, muon: bool, moment_bytes: int = FP32_BYTES) -> int:
    """Size on disk: weights, their fp32 main copies, and two moments of each; one of what Muon moves.

    Args:
        shape: Of the model.
        weight_bytes: Of a number as GEMMs read it.
        muon: Whether Muon moves matrices.
        moment_bytes: Of a number of a moment.
    """
    total = params_total(shape)
    moments = 2 * total - (params_of_muon(shape) if muon else 0)
    return total * (weight_bytes + FP32_BYTES) + moments * moment_bytes


def run_host_bytes(config: RunConfig) -> float:
    """Host memory of a rank of the fullest pipeline stage of a run that saves."""
    parallel, shape = config.parallel, shape_of(config.model)
    layers = parallel.stage_layers or chunk_layers(shape, parallel.pp, parallel.vpp)
    stages = split_stages(shape, layers, parallel.pp)
    return host_bytes(max(_held(shape, stage, parallel) for stage in stages))


def _held(shape: Shape, stage: Stage, parallel: ParallelSection) -> int:
    """Parameters that a rank of a stage holds."""
    return sum(
        count * sum(params_on_rank(weights, tp=parallel.tp, expert_ranks=parallel.ep * parallel.etp))
        for weights, count in stage_parts(shape, stage)
    )


def params_of_muon(shape: Shape) -> int:
    """Parameters that Muon moves."""
    return sum(weight.numel for weight in all_weights(shape) if weight.is_of_muon)


def host_bytes(params: float) -> float:
    """Host memory of one rank that reads a checkpoint which any layout can read, or writes it.

    It has main copies and both moments of all that a rank holds, not of its share, in fp32: to read on each
    data-parallel rank, to write on the first; a moment that Muon does not keep has its place, too.

    Args:
        params: Numbers that the rank holds.
    """
    return params * 3 * FP32_BYTES
