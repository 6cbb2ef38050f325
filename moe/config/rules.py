"""Rules that join several keys. Each names the keys it reads, so it runs even when other keys are wrong.

A rule returns None, or one sentence that names the values and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe.config.energy_rules import ENERGY_CHECKS
from moe.config.engine_rules import ENGINE_CHECKS
from moe.config.expert_rules import EXPERT_CHECKS
from moe.config.optim_rules import OPTIM_CHECKS
from moe.config.parallel_rules import PARALLEL_CHECKS

_LAYOUT = ("world_size", "parallel.tp", "parallel.pp", "parallel.cp")
_MOST_TOP_K_FUSED = 32  # moe.layer.dispatch_check; DeepEP gives a warp's lane to each as well
_LARGEST_LISTED_DIVISOR = 1024  # of a size; no layout is wider along one axis


@dataclass(frozen=True)
class Rule:
    """A check over the values of `keys` (dotted), in that order."""

    keys: tuple[str, ...]
    check: Callable[..., str | None]


@dataclass(frozen=True)
class Violation:
    """A broken rule: the keys that it joins and what to do."""

    keys: tuple[str, ...]
    message: str


def violations(
    values: Mapping[str, Any], world_size: int | None, rules: Sequence[Rule] | None = None
) -> list[Violation]:
    """Every broken rule among those whose keys are all present.

    Args:
        values: Leaf values by dotted key; a key whose value is invalid is left out.
        world_size: Number of ranks the run will have; None leaves out the rules about it.
        rules: None is all of RULES.
    """
    known = dict(values) if world_size is None else {**values, "world_size": world_size}
    found = []
    for rule in RULES if rules is None else rules:
        if all(key in known for key in rule.keys):
            message = rule.check(*(known[key] for key in rule.keys))
            if message is not None:
                found.append(Violation(rule.keys, message))
    return found


def _divisors(n: int, *, up_to: int = _LARGEST_LISTED_DIVISOR) -> str:
    """The divisors of n that a layout may use, in words."""
    return ", ".join(str(d) for d in range(1, min(n, up_to, _LARGEST_LISTED_DIVISOR) + 1) if n % d == 0)


def _divides(small_key: str, big_key: str) -> Rule:
    """The value of small_key must divide that of big_key."""

    def check(small: int, big: int) -> str | None:
        if big % small == 0:
            return None
        return f"{small_key}={small} does not divide {big_key}={big}; allowed: {_divisors(big)}"

    return Rule((small_key, big_key), check)


# ---- layout -----------------------------------------------------------------------------------------------


def _world(world: int, tp: int, pp: int, cp: int) -> str | None:
    need = tp * pp * cp
    if world % need == 0:
        return None
    return (
        f"{world} rank(s) cannot be split into tp*pp*cp = {tp}*{pp}*{cp} = {need}; "
        f"use --nproc with a multiple of {need} or smaller parallel.tp, pp, cp"
    )


def _ep_ranks(ep: int, etp: int, world: int, pp: int) -> str | None:
    per_stage, rest = divmod(world, pp)
    if rest or per_stage % (ep * etp) == 0:  # a rest is _world's finding
        return None
    size = f"parallel.ep={ep}" if etp == 1 else f"parallel.ep*parallel.etp = {ep}*{etp} = {ep * etp}"
    return (
        f"{size} does not divide the {per_stage} rank(s) of a pipeline stage; allowed: {_divisors(per_stage)}"
    )


def _fused(dispatcher: str, ep: int, precision: str, device: str, top_k: int) -> str | None:
    """What the libraries can never do; whether one is here is seen at start (moe.layer.fused_library)."""
    if dispatcher not in ("deepep", "hybridep"):
        return None
    if ep == 1:
        return f"parallel.dispatcher={dispatcher} moves nothing with parallel.ep=1; use alltoall"
    if precision != "bf16" or device == "cpu":
        return (
            f"parallel.dispatcher={dispatcher} is a CUDA library that sums rows in bf16, but train.precision="
            f"{precision} and engine.device={device}; use parallel.dispatcher=hierarchical or alltoall"
        )
    if top_k > _MOST_TOP_K_FUSED:
        return (
            f"parallel.dispatcher={dispatcher} is checked at the start with sums that are exact up to "
            f"{_MOST_TOP_K_FUSED} experts a token, and model.top_k={top_k}; "
            "use parallel.dispatcher=hierarchical or alltoall"
        )
    return None


def _whole_nodes(dispatcher: str, per_node: int, ep: int, etp: int) -> str | None:
    if dispatcher != "hierarchical" or (per_node == 0 and ep > 1):  # the launcher's number is seen at start
        return None
    ranks = ep * etp
    if per_node and ranks % per_node == 0 and ranks > per_node and per_node % etp == 0:
        return None
    size = f"parallel.ep={ep}" if etp == 1 else f"parallel.ep*parallel.etp = {ep}*{etp} = {ranks}"
    return (
        f"parallel.dispatcher=hierarchical needs {size} to be two or more whole nodes of "
        f"parallel.ranks_per_node={per_node}; inside one node use parallel.dispatcher=alltoall"
    )


def _per_step(key: str) -> Rule:
    """The sequences of one optimizer step or one evaluation must fill every data-parallel rank alike."""

    def check(sequences: int, micro: int, world: int, *tp_pp_cp: int) -> str | None:
        dp, rest = divmod(world, math.prod(tp_pp_cp))
        if rest or sequences % (micro * dp) == 0:  # a rest is _world's finding
            return None
        whole = micro * dp
        return (
            f"{key}={sequences} is not a multiple of train.micro_batch_size*dp = {micro}*{dp} = {whole}; "
            f"use for example {max(1, round(sequences / whole)) * whole}"
        )

    return Rule((key, "train.micro_batch_size", *_LAYOUT), check)


def _in_turns(key: str) -> Rule:
    """Chunks take turns in rounds of as many micro-batches as there are stages."""

    def check(sequences: int, micro: int, vpp: int, world: int, *tp_pp_cp: int) -> str | None:
        dp, rest = divmod(world, math.prod(tp_pp_cp))
        if vpp == 1 or rest or sequences % (micro * dp):  # findings of other rules
            return None
        pp = tp_pp_cp[1]
        rounds = micro * dp * pp
        if sequences % rounds == 0:
            return None
        return (
            f"with parallel.vpp={vpp}, {key}={sequences} must be a multiple of train.micro_batch_size*dp*"
            f"parallel.pp = {micro}*{dp}*{pp} = {rounds}; use for example "
            f"{max(1, round(sequences / rounds)) * rounds}"
        )

    return Rule((key, "train.micro_batch_size", "parallel.vpp", *_LAYOUT), check)


# ---- model ------------------------------------------------------------------------------------------------


def _query_groups(groups: int, heads: int) -> str | None:
    if groups == 0 or heads % groups == 0:
        return None
    return (
        f"model.attention.num_query_groups={groups} does not divide model.attention.num_heads={heads}; "
        f"allowed: {_divisors(heads)}, or 0 for one group a head"
    )


def _tp_groups(tp: int, groups: int, kind: str) -> str | None:
    if kind == "mla" or groups % tp == 0:  # no groups: then the rule about heads speaks
        return None
    return (
        f"parallel.tp={tp} does not divide model.attention.num_query_groups={groups}; "
        f"allowed: {_divisors(groups)}"
    )


def _rotary_dim(rotary: int, head_dim: int, kind: str) -> str | None:
    if kind == "mla" or rotary <= head_dim:
        return None
    return (
        f"model.attention.rotary_dim={rotary} is more than model.attention.head_dim={head_dim}; "
        f"use at most {head_dim}, or 0 for all of it"
    )


def _yarn_betas(fast: float, slow: float) -> str | None:
    if slow < fast:
        return None
    return (
        f"model.attention.yarn.beta_slow={slow:g} is not below model.attention.yarn.beta_fast={fast:g}; "
        "a fast pair turns oftener than a slow one"
    )


def _window_pattern(every: int, window: int) -> str | None:
    if every == 0 or window > 0:
        return None
    return (
        f"model.attention.full_attention_every={every} says which layers have no window, "
        "but model.attention.sliding_window=0 gives none; set the window, or leave the pattern out"
    )


def _only_gqa(key: str, off: object) -> Rule:
    """A key that latent attention does not read must be left at its default there."""

    def check(value: object, kind: str) -> str | None:
        if kind == "gqa" or value == off:
            return None
        return (
            f"{key}={str(value).lower()} has no meaning with model.attention.kind={kind}; "
            "leave it out, or use model.attention.kind=gqa"
        )

    return Rule((key, "model.attention.kind"), check)


def _top_k(top_k: int, experts: int) -> str | None:
    if top_k <= experts:
        return None
    return f"model.top_k={top_k} is more than model.num_experts={experts}; lower model.top_k"


def _dense_layers(dense: int, layers: int) -> str | None:
    if dense < layers:
        return None
    return (
        f"model.num_dense_layers={dense} leaves no expert layer among model.num_layers={layers}; "
        f"allowed: 0 to {layers - 1}"
    )


def _top_groups(top_groups: int, num_groups: int) -> str | None:
    if top_groups <= num_groups:
        return None
    return (
        f"model.router.top_groups={top_groups} is more than model.router.num_groups={num_groups}; "
        f"allowed: 1 to {num_groups}"
    )


def _expert_groups(num_groups: int, experts: int) -> str | None:
    if num_groups == 1 or (experts % num_groups == 0 and num_groups < experts):
        return None
    return (
        f"model.router.num_groups={num_groups} does not divide model.num_experts={experts} into groups of "
        f"two or more; allowed: {_divisors(experts, up_to=max(1, experts // 2))}"
    )


def _open_experts(top_k: int, top_groups: int, num_groups: int, experts: int) -> str | None:
    size, rest = divmod(experts, num_groups)
    if rest or size < 2 or top_k > experts:  # findings of other rules
        return None
    if num_groups == 1 or top_k <= top_groups * size:
        return None
    return (
        f"model.top_k={top_k} is more than the {top_groups * size} experts of model.router.top_groups="
        f"{top_groups} groups of {size}; use model.router.top_groups={-(-top_k // size)}"
    )


def _order(score: str, before: bool) -> str | None:
    if score == "softmax" or before:
        return None
    return (
        f"model.router.score={score} is elementwise, so score_before_topk=false means nothing; set it to true"
    )


# ---- training and data ------------------------------------------------------------------------------------


def _lr(min_lr: float, lr: float) -> str | None:
    return None if min_lr <= lr else f"optim.min_lr={min_lr:g} is above optim.lr={lr:g}; lower optim.min_lr"


def _warmup(warmup: int, decay: int) -> str | None:
    if decay == 0 or warmup < decay:  # a short trial run may well end within the warm-up
        return None
    return f"optim.warmup_steps={warmup} does not end before optim.decay_steps={decay}; lower the warm-up"


def _heldout(heldout: tuple[object, ...], train: tuple[object, ...], tokenizer: str) -> str | None:
    if bool(heldout) != bool(train):
        return (
            "data.train and data.heldout are given together or not at all; "
            "add the missing one (moe data prepare)"
        )
    if train and tokenizer == "default":
        return (
            "data.train needs data.tokenizer: the tokenizer.json (or `bytes`) "
            "that the prefixes were prepared with"
        )
    if not train and tokenizer != "default":
        return f"data.tokenizer={tokenizer} needs data.train and data.heldout (moe data prepare makes them)"
    return None


def _aligned(key: str) -> Rule:
    """Grouped GEMMs take rows whose length is a multiple of 16 bytes."""

    def check(size: int, precision: str) -> str | None:
        multiple = 8 if precision == "bf16" else 4
        if size % multiple == 0:
            return None
        return (
            f"{key}={size} is not a multiple of {multiple}, as train.precision={precision} needs (16 bytes); "
            f"use {-(-size // multiple) * multiple}"
        )

    return Rule((key, "train.precision"), check)


RULES: tuple[Rule, ...] = (
    _aligned("model.hidden_size"),
    _aligned("model.expert_hidden_size"),
    Rule(_LAYOUT, _world),
    Rule(("parallel.ep", "parallel.etp", "world_size", "parallel.pp"), _ep_ranks),
    _divides("parallel.ep", "model.num_experts"),
    Rule(("parallel.dispatcher", "parallel.ep", "train.precision", "engine.device", "model.top_k"), _fused),
    Rule(("parallel.dispatcher", "parallel.ranks_per_node", "parallel.ep", "parallel.etp"), _whole_nodes),
    *(Rule(keys, check) for keys, check in EXPERT_CHECKS),
    *(Rule(keys, check) for keys, check in PARALLEL_CHECKS),
    _divides("parallel.tp", "model.attention.num_heads"),
    _divides("parallel.tp", "model.ffn_hidden_size"),
    _divides("parallel.tp", "model.shared_expert_hidden_size"),
    _divides("parallel.tp", "model.vocab_size"),
    Rule(
        ("parallel.tp", "model.attention.num_query_groups", "model.attention.kind"),
        _tp_groups,
    ),
    Rule(("model.attention.num_query_groups", "model.attention.num_heads"), _query_groups),
    Rule(
        ("model.attention.rotary_dim", "model.attention.head_dim", "model.attention.kind"),
        _rotary_dim,
    ),
    Rule(("model.attention.yarn.beta_fast", "model.attention.yarn.beta_slow"), _yarn_betas),
    Rule(("model.attention.full_attention_every", "model.attention.sliding_window"), _window_pattern),
    _only_gqa("model.attention.rotary_dim", 0),
    _only_gqa("model.attention.qk_norm", "none"),
    _only_gqa("model.attention.qkv_bias", off=False),
    _only_gqa("model.attention.output_bias", off=False),
    _only_gqa("model.attention.sinks", off=False),
    _only_gqa("model.attention.sliding_window", 0),
    Rule(("model.top_k", "model.num_experts"), _top_k),
    Rule(("model.num_dense_layers", "model.num_layers"), _dense_layers),
    Rule(("model.router.top_groups", "model.router.num_groups"), _top_groups),
    Rule(("model.router.num_groups", "model.num_experts"), _expert_groups),
    Rule(
        ("model.top_k", "model.router.top_groups", "model.router.num_groups", "model.num_experts"),
        _open_experts,
    ),
    Rule(("model.router.score", "model.router.score_before_topk"), _order),
    _per_step("train.global_batch_size"),
    _per_step("train.eval_sequences"),
    _in_turns("train.global_batch_size"),
    _in_turns("train.eval_sequences"),
    Rule(("optim.min_lr", "optim.lr"), _lr),
    Rule(("optim.warmup_steps", "optim.decay_steps"), _warmup),
    *(Rule(keys, check) for keys, check in ENGINE_CHECKS),
    *(Rule(keys, check) for keys, check in OPTIM_CHECKS),
    Rule(("data.heldout", "data.train", "data.tokenizer"), _heldout),
    *(Rule(keys, check) for keys, check in ENERGY_CHECKS),
)
