"""Rules of the section `parallel`, beside those about the number of ranks, and of what experts' kernels take.

rules.py says what a rule is.
"""

from __future__ import annotations

from collections.abc import Callable

# Of moe.kernels.expert_mlp in every format: a tile of the experts' hidden size, a load of bytes of a row.
LOW_PRECISION_TILE, LOW_PRECISION_ROW = 128, 16


def _expert_slices(etp: int, hidden: int, precision: str, expert_precision: str) -> str | None:
    if expert_precision == "wide":
        multiple, needing = 8 if precision == "bf16" else 4, f"train.precision={precision} needs (16 bytes)"
    else:
        multiple = LOW_PRECISION_TILE
        needing = f"the kernels of model.expert_precision={expert_precision} need (tiles of {multiple})"
    if etp == 1 or hidden % multiple or hidden % (etp * multiple) == 0:  # whole experts: other rules' finding
        return None
    allowed = ", ".join(str(n) for n in range(1, hidden + 1) if hidden % (n * multiple) == 0)
    return (
        f"parallel.etp={etp} does not split model.expert_hidden_size={hidden} into parts that are multiples "
        f"of {multiple}, as {needing}; allowed: {allowed}"
    )


def _low_precision(precision: str, activation: str, bias: bool, hidden: int, model_size: int) -> str | None:
    """What the kernels of low precision take, whatever the format (moe.kernels.expert_mlp)."""
    if precision == "wide":
        return None
    if activation != "swiglu" or bias:
        return (
            f"model.expert_precision={precision} takes swiglu experts without biases, but "
            f"model.expert_activation={activation} and model.expert_bias={str(bias).lower()}; "
            "use model.expert_precision=wide"
        )
    if hidden % LOW_PRECISION_TILE or model_size % LOW_PRECISION_ROW:
        return (
            f"the kernels of model.expert_precision={precision} take a model.expert_hidden_size that is a "
            f"multiple of {LOW_PRECISION_TILE} and a model.hidden_size that is one of {LOW_PRECISION_ROW}, "
            f"not {hidden} and {model_size}; use {_next_multiple(hidden, LOW_PRECISION_TILE)} and "
            f"{_next_multiple(model_size, LOW_PRECISION_ROW)}, or model.expert_precision=wide"
        )
    return None


def _next_multiple(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _bias_slices(etp: int, hidden: int, bias: bool) -> str | None:
    if not bias or hidden % etp == 0:
        return None
    return (
        f"parallel.etp={etp} does not divide model.hidden_size={hidden}, over which the biases of "
        "model.expert_bias=true are split; use a divisor of both hidden sizes"
    )


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
    (
        ("parallel.etp", "model.expert_hidden_size", "train.precision", "model.expert_precision"),
        _expert_slices,
    ),
    (
        (
            "model.expert_precision",
            "model.expert_activation",
            "model.expert_bias",
            "model.expert_hidden_size",
            "model.hidden_size",
        ),
        _low_precision,
    ),
    (("parallel.etp", "model.hidden_size", "model.expert_bias"), _bias_slices),
    (("parallel.stage_layers", "parallel.pp", "parallel.vpp", "model.num_layers"), _stage_layers),
    (("parallel.vpp", "parallel.pp"), _chunks),
    (("parallel.overlap_param_gather", "parallel.overlap_grad_reduce"), _overlap),
    (("data.seq_length", "parallel.tp", "parallel.cp"), _sequence),
)
