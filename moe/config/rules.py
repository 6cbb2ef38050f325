"""Rules that join several keys. Each names the keys it reads, so it runs even when other keys are wrong.

A rule returns None, or one sentence that names the values and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """A check over the values of `keys` (dotted), in that order."""

    keys: tuple[str, ...]
    check: Callable[..., str | None]


@dataclass(frozen=True)
class Violation:
    """A broken rule: the keys it joins, the first being where it is reported, and what to do."""

    keys: tuple[str, ...]
    message: str


def violations(values: Mapping[str, Any], world_size: int | None) -> list[Violation]:
    """Every broken rule among those whose keys are all present.

    Args:
        values: leaf values by dotted key; a key whose value is invalid is left out.
        world_size: number of ranks the run will have; None leaves out the rules about it.
    """
    known = dict(values) if world_size is None else {**values, "world_size": world_size}
    found = []
    for rule in RULES:
        if all(key in known for key in rule.keys):
            message = rule.check(*(known[key] for key in rule.keys))
            if message is not None:
                found.append(Violation(rule.keys, message))
    return found


def divisors(n: int) -> list[int]:
    """The positive divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def _divides(small_key: str, big_key: str) -> Rule:
    """The value of small_key must divide that of big_key."""

    def check(small: int, big: int) -> str | None:
        if big % small == 0:
            return None
        allowed = ", ".join(str(d) for d in divisors(big)[:12])
        return f"{small_key}={small} does not divide {big_key}={big}; allowed: {allowed}"

    return Rule((small_key, big_key), check)


def _query_groups(groups: int, heads: int) -> str | None:
    if groups == 0 or heads % groups == 0:
        return None
    return f"num_query_groups={groups} does not divide num_heads={heads}; allowed: {divisors(heads)}"


def _tp_groups(tp: int, groups: int, heads: int, kind: str) -> str | None:
    if kind == "mla" or (groups or heads) % tp == 0:
        return None
    return f"parallel.tp={tp} does not divide {groups or heads} query groups; allowed: {divisors(groups or heads)}"


def _top_k(top_k: int, experts: int) -> str | None:
    return (
        None if top_k <= experts else f"top_k={top_k} is more than num_experts={experts}; lower model.top_k"
    )


def _dense_layers(dense: int, layers: int) -> str | None:
    if dense < layers:
        return None
    return (
        f"num_dense_layers={dense} leaves no expert layer among num_layers={layers}; allowed: 0..{layers - 1}"
    )


def _world(world: int, tp: int, pp: int, cp: int) -> str | None:
    need = tp * pp * cp
    if world % need == 0:
        return None
    return f"{world} ranks cannot be split into tp*pp*cp = {tp}*{pp}*{cp} = {need}; use --nproc with a multiple of {need}"


def _ep_ranks(ep: int, world: int, pp: int) -> str | None:
    if world % pp or (world // pp) % ep == 0:  # the first is _world's finding
        return None
    per_stage = world // pp
    return f"parallel.ep={ep} does not divide the {per_stage} ranks of a pipeline stage; allowed: {divisors(per_stage)}"


def _batch(batch: int, micro: int, world: int, tp: int, pp: int, cp: int) -> str | None:
    need = tp * pp * cp
    if world % need:
        return None
    dp = world // need
    if batch % (micro * dp) == 0:
        return None
    return (
        f"global_batch_size={batch} is not a multiple of micro_batch_size*dp = {micro}*{dp} = {micro * dp}; "
        f"use for example {max(1, round(batch / (micro * dp))) * micro * dp}"
    )


def _eval_batch(sequences: int, micro: int, world: int, tp: int, pp: int, cp: int) -> str | None:
    need = tp * pp * cp
    if world % need or sequences % (micro * (world // need)) == 0:
        return None
    unit = micro * (world // need)
    return f"eval_sequences={sequences} is not a multiple of micro_batch_size*dp = {unit}; use for example {-(-sequences // unit) * unit}"


def _lr(min_lr: float, lr: float) -> str | None:
    return None if min_lr <= lr else f"min_lr={min_lr:g} is above lr={lr:g}; lower optim.min_lr"


def _warmup(warmup: int, decay: int) -> str | None:
    if decay == 0 or warmup < decay:  # a short trial run may well end within the warm-up
        return None
    return f"warmup_steps={warmup} does not end before the decay's end at step {decay}; lower it"


def _context_parallel(cp: int) -> str | None:
    return None if cp == 1 else f"parallel.cp={cp}: context parallelism is not available yet; allowed: 1"


def _order(score: str, before: bool) -> str | None:
    if score == "sigmoid" and not before:
        return "score=sigmoid is elementwise, so score_before_topk=false means nothing; set it to true"
    return None


def _heldout(heldout: tuple[object, ...], train: tuple[object, ...], tokenizer: str) -> str | None:
    if bool(heldout) != bool(train):
        return "data.train and data.heldout are given together or not at all; add the missing one (moe data prepare)"
    if train and tokenizer == "default":
        return "data.train needs data.tokenizer: the tokenizer.json (or `bytes`) that the prefixes were prepared with"
    if not train and tokenizer != "default":
        return f"data.tokenizer={tokenizer} needs data.train and data.heldout prepared with it (moe data prepare)"
    return None


_LAYOUT = ("world_size", "parallel.tp", "parallel.pp", "parallel.cp")

RULES: tuple[Rule, ...] = (
    Rule(("parallel.cp",), _context_parallel),
    Rule(("world_size", "parallel.tp", "parallel.pp", "parallel.cp"), _world),
    _divides("parallel.ep", "model.num_experts"),
    Rule(("parallel.ep", "world_size", "parallel.pp"), _ep_ranks),
    _divides("parallel.tp", "model.attention.num_heads"),
    Rule(("model.attention.num_query_groups", "model.attention.num_heads"), _query_groups),
    Rule(
        (
            "parallel.tp",
            "model.attention.num_query_groups",
            "model.attention.num_heads",
            "model.attention.kind",
        ),
        _tp_groups,
    ),
    _divides("parallel.tp", "model.ffn_hidden_size"),
    _divides("parallel.tp", "model.vocab_size"),
    _divides("parallel.tp", "data.seq_length"),  # sequence parallelism splits the sequence over tp
    _divides("parallel.pp", "model.num_layers"),
    Rule(("model.top_k", "model.num_experts"), _top_k),
    Rule(("model.num_dense_layers", "model.num_layers"), _dense_layers),
    Rule(("train.global_batch_size", "train.micro_batch_size", *_LAYOUT), _batch),
    Rule(("train.eval_sequences", "train.micro_batch_size", *_LAYOUT), _eval_batch),
    Rule(("optim.min_lr", "optim.lr"), _lr),
    Rule(("optim.warmup_steps", "optim.decay_steps"), _warmup),
    Rule(("model.router.score", "model.router.score_before_topk"), _order),
    Rule(("data.heldout", "data.train", "data.tokenizer"), _heldout),
)
