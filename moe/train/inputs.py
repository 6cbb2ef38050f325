"""What a run reads: the tokenizer and the token files, found or made, and checked before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from moe.config.schema import BlendPart, RunConfig
from moe.data.default import ensure_default
from moe.data.tokenizer import Tokenizer
from moe.data.validate import check_ids, validate_prefix
from moe.errors import InputError
from moe.ranks import on_every_rank, on_rank0

Blend = tuple[tuple[Path, float], ...]


@dataclass(frozen=True)
class Inputs:
    """Paths of a run's data, the same on every rank."""

    tokenizer: str  # what Tokenizer.load takes
    train: Blend
    heldout: Blend
    cache_dir: Path


def find_inputs(config: RunConfig, on_progress: Callable[[str], None]) -> Inputs:
    """Find the data that the config names, or make the default data, and check all of it; collective.

    Rank 0 checks how the files are laid out. All share the token ids, each an equal part of each file:
    trillions of them would keep one rank busy for hours.

    Raises:
        InputError: a machine cannot read a file, or the tokenizer has more ids than the model.
        CorruptDataError: a token file is damaged; the text names file and offset.
    """
    inputs = on_rank0(lambda: _find(config, on_progress))
    share = (dist.get_rank(), dist.get_world_size())

    def check_own_share() -> None:
        for prefix, _ in inputs.train + inputs.heldout:
            check_ids(prefix, config.model.vocab_size, share=share)

    on_every_rank(check_own_share)
    return inputs


def _find(config: RunConfig, on_progress: Callable[[str], None]) -> Inputs:
    data, vocab_size = config.data, config.model.vocab_size
    cache_dir = data.cache_dir.expanduser()
    if data.train:
        inputs = Inputs(data.tokenizer, _blend(data.train), _blend(data.heldout), cache_dir)
    else:
        made = ensure_default(cache_dir, vocab_size, on_progress)
        inputs = Inputs(str(made.tokenizer), ((made.train, 1.0),), ((made.heldout, 1.0),), cache_dir)
    tokenizer = Tokenizer.load(inputs.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"tokenizer {inputs.tokenizer} has {tokenizer.vocab_size} ids, model.vocab_size is {vocab_size}; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    for prefix, _ in inputs.train + inputs.heldout:
        validate_prefix(prefix, tokenizer.fingerprint)
    return inputs


def _blend(parts: tuple[BlendPart, ...]) -> Blend:
    return tuple((part.prefix, part.weight) for part in parts)
