"""Rules about the engine; rules.py says what a rule is.

What DeepSpeed cannot do, or does wrongly without a word, is refused here by name, before anything starts.
ZeRO stage 0 (wrong in bf16), fp16 and DeepSpeed's own checkpoints have no keys at all.
"""

from __future__ import annotations

from collections.abc import Callable

Check = tuple[tuple[str, ...], Callable[..., str | None]]


def _only_megatron(key: str, off: object, why: str) -> Check:
    """A key that DeepSpeed has no counterpart of must be left at its default there."""

    def check(value: object, engine: str) -> str | None:
        if engine == "megatron" or value == off:
            return None
        shown = str(value).lower() if isinstance(value, bool) else value
        return f"{key}={shown} with engine.name={engine}: {why}; use engine.name=megatron"

    return (key, "engine.name"), check


def _only_deepspeed(key: str, off: object) -> Check:
    """A key that Megatron does not read must be left at its default there."""

    def check(value: object, engine: str) -> str | None:
        if engine == "deepspeed" or value == off:
            return None
        return f"{key}={value} has no meaning with engine.name={engine}; use engine.name=deepspeed"

    return (key, "engine.name"), check


def _offload(offload: str, stage: int) -> str | None:
    if offload != "all" or stage == 3:
        return None
    return (
        f"engine.offload=all moves the sharded weights of engine.zero_stage=3, but engine.zero_stage={stage} "
        "keeps them whole; use engine.offload=optimizer or engine.zero_stage=3"
    )


ENGINE_CHECKS: tuple[Check, ...] = (
    _only_megatron("parallel.pp", 1, "ZeRO shards what a pipeline would split"),
    _only_megatron("parallel.cp", 1, "it would not add up gradients over parts of a sequence"),
    _only_megatron("parallel.etp", 1, "ZeRO knows groups of whole experts only"),
    _only_megatron("parallel.overlap_grad_reduce", False, "ZeRO has its own overlap"),
    _only_deepspeed("engine.zero_stage", 1),
    _only_deepspeed("engine.offload", "none"),
    (("engine.offload", "engine.zero_stage"), _offload),
)
