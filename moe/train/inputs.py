"""What a run reads: the tokenizer and the token files, found or made, and checked before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe.config.schema import BlendPart, RunConfig
from moe.data.default import ensure_default
from moe.data.tokenizer import Tokenizer
from moe.data.validate import validate_prefix
from moe.errors import InputError

Blend = tuple[tuple[Path, float], ...]


@dataclass(frozen=True)
class Inputs:
    """Paths of a run's data, the same on every rank."""

    tokenizer: str  # what Tokenizer.load takes
    train: Blend
    heldout: Blend
    cache_dir: Path


def find_inputs(config: RunConfig, on_progress: Callable[[str], None]) -> Inputs:
    """Find the data that the config names, or make the default data, and check every token file.

    Raises:
        InputError: a file is missing, or the tokenizer has more ids than the model.
        CorruptDataError: a token file is damaged; the text names file and offset.
    """
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
        validate_prefix(prefix, vocab_size, tokenizer.fingerprint)
    return inputs


def _blend(parts: tuple[BlendPart, ...]) -> Blend:
    return tuple((part.prefix, part.weight) for part in parts)
