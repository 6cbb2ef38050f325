"""Rules about the optimizer and its schedules; rules.py says what a rule is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

Check = tuple[tuple[str, ...], Callable[..., str | None]]


def _stable(stable: int, schedule: str, warmup: int, decay: int) -> str | None:
    if schedule != "wsd":
        if stable == 0:
            return None
        return f"optim.stable_steps={stable} needs optim.schedule=wsd, not {schedule}; leave it out"
    if warmup <= stable and (decay == 0 or stable < decay):  # a trial run may well end before the decay
        return None
    return (
        f"optim.stable_steps={stable}, where the decay begins, must lie between optim.warmup_steps={warmup} "
        f"and optim.decay_steps={decay or 'train.steps'}"
    )


def _norm_before_clip(tau: float, norm: str) -> str | None:
    if tau == 0 or norm == "none":
        return None
    return (
        f"optim.qk_clip={tau:g} scales weights, which the norms of model.attention.qk_norm={norm} undo; "
        "leave one of them out"
    )


def _engine(key: str, off: object) -> Check:
    """What only one engine does must be left out with another."""

    def check(value: object, engine: str) -> str | None:
        # An empty list, as YAML gives it, is an empty tuple.
        if value == off or not (value or off) or engine == "megatron":
            return None
        return f"{key}={value} is not available with engine.name={engine}; use engine.name=megatron"

    return (key, "engine.name"), check


def _batches(
    stages: Sequence[Mapping[str, int]], micro: int, vpp: int, world: int, *tp_pp_cp: int
) -> str | None:
    """Each stage's batch must fill the ranks as the last one does."""
    dp, rest = divmod(world, math.prod(tp_pp_cp))
    whole = micro * dp * (tp_pp_cp[1] if vpp > 1 else 1)
    batches = [stage["global_batch_size"] for stage in stages]
    odd = [batch for batch in batches if not rest and batch % whole]
    if not odd:
        return None
    product = f"train.micro_batch_size*dp{'*parallel.pp' if vpp > 1 else ''} = {whole}"
    return (
        f"train.batch_schedule has batches of {', '.join(map(str, odd))}, no multiples of {product}; "
        f"use for example {max(1, round(odd[0] / whole)) * whole}"
    )


OPTIM_CHECKS: tuple[Check, ...] = (
    (
        (
            "optim.stable_steps",
            "optim.schedule",
            "optim.warmup_steps",
            "optim.decay_steps",
        ),
        _stable,
    ),
    (("optim.qk_clip", "model.attention.qk_norm"), _norm_before_clip),
    _engine("optim.name", "adamw"),
    _engine("optim.qk_clip", 0.0),
    _engine("train.batch_schedule", ()),
    (
        (
            "train.batch_schedule",
            "train.micro_batch_size",
            "parallel.vpp",
            "world_size",
            "parallel.tp",
            "parallel.pp",
            "parallel.cp",
        ),
        _batches,
    ),
)
