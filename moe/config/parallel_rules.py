"""Rules of the section `parallel`, beside those about the number of ranks; rules.py says what a rule is."""

from __future__ import annotations

from collections.abc import Callable


def _stage_layers(stage_layers: tuple[int, ...], pp: int, vpp: int, layers: int) -> str | None:
    chunks = pp * vpp
    if not stage_layers:
        if layers >= chunks:
            return None
        return (
            f"model.num_layers={layers} is less than the parallel.pp*parallel.vpp = {pp}*{vpp} = {chunks} "
            "chunks of the pipeline; lower them, or name the empty chunks in parallel.stage_layers"
        )
    if len(stage_layers) == chunks and sum(stage_layers) == layers:
        return None
    return (
        f"parallel.stage_layers={list(stage_layers)} is {len(stage_layers)} chunks with "
        f"{sum(stage_layers)} layers; it must be parallel.pp*parallel.vpp = {pp}*{vpp} = {chunks} numbers "
        f"whose sum is model.num_layers={layers}"
    )


def _chunks(vpp: int, pp: int) -> str | None:
    if vpp == 1 or pp > 1:
        return None
    return (
        f"parallel.vpp={vpp} chunks take turns only in a pipeline, but parallel.pp={pp}; use parallel.vpp=1"
    )


def _overlap(gather: bool, reduce: bool) -> str | None:
    if reduce or not gather:
        return None
    return (
        "parallel.overlap_param_gather=true needs the gradient buckets of parallel.overlap_grad_reduce=true; "
        "set both"
    )


def _sequence(length: int, tp: int, cp: int) -> str | None:
    # Context parallelism gives each rank two pieces of the sequence; sequence parallelism splits over tp.
    parts = tp * (2 * cp if cp > 1 else 1)
    if length % parts == 0:
        return None
    product = f"parallel.tp={tp}" if cp == 1 else f"parallel.tp*2*parallel.cp = {tp}*2*{cp} = {parts}"
    return (
        f"data.seq_length={length} is not a multiple of {product}; use for example "
        f"{-(-length // parts) * parts}"
    )


PARALLEL_CHECKS: tuple[tuple[tuple[str, ...], Callable[..., str | None]], ...] = (
    (("parallel.stage_layers", "parallel.pp", "parallel.vpp", "model.num_layers"), _stage_layers),
    (("parallel.vpp", "parallel.pp"), _chunks),
    (("parallel.overlap_param_gather", "parallel.overlap_grad_reduce"), _overlap),
    (("data.seq_length", "parallel.tp", "parallel.cp"), _sequence),
)
