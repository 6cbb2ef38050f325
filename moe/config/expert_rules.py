"""Rules of experts: what their kernels take, whole and split over ranks; rules.py says what a rule is."""

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


def _fp8_store(stores: bool, precision: str) -> str | None:
    if not stores or precision != "wide":
        return None
    return (
        "model.expert_fp8_input_store=true saves in the format of model.expert_precision, which is wide; "
        "use fp8, fp8_power_of_two or mxfp8"
    )


def _wide_into_activation(stays_wide: bool, precision: str, stores_fp8: bool) -> str | None:
    if not stays_wide:
        return None
    if precision == "wide":
        return (
            "model.expert_wide_into_activation=true leaves two of the products of model.expert_precision "
            "unquantised, but that is wide; use fp8, fp8_power_of_two or mxfp8"
        )
    if stores_fp8:
        return (
            "model.expert_fp8_input_store=true rounds what model.expert_wide_into_activation=true keeps; "
            "use one of the two"
        )
    return None


EXPERT_CHECKS: tuple[tuple[tuple[str, ...], Callable[..., str | None]], ...] = (
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
    (("model.expert_fp8_input_store", "model.expert_precision"), _fp8_store),
    (
        ("model.expert_wide_into_activation", "model.expert_precision", "model.expert_fp8_input_store"),
        _wide_into_activation,
    ),
)
