"""The default data, built on first use: a tokenizer and two splits of the Python standard library."""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe.data.prepare import prepare_documents
from moe.data.progress import Progress, silent
from moe.data.stdlib_corpus import documents, source_files
from moe.data.tokenizer import train_byte_bpe
from moe.errors import InputError

_RECIPE_VERSION = 1  # raise it when the corpus, the split or the tokenizer's training changes
_SPLITS: tuple[Literal["train", "heldout"], ...] = ("train", "heldout")


@dataclass(frozen=True, slots=True)
class DefaultData:
    """Where the default data lies: a tokenizer.json and the prefixes of two pairs of token files."""

    tokenizer: Path
    train: Path
    heldout: Path


def ensure_default(
    cache_dir: Path, vocab_size: int = 4096, on_progress: Progress | None = None
) -> DefaultData:
    """Return the default data, building it the first time (about 10 s on one core).

    The data is kept in a folder of `cache_dir` named by what it depends on: the Python version, the names and
    sizes of the corpus files, the vocabulary size and the recipe. The folder appears complete or not at all,
    and a second process that starts meanwhile waits for the first.

    Args:
        cache_dir: Where to keep the data; created if absent.
        vocab_size: Number of ids of the byte-level BPE.
        on_progress: Receives a line a stage and about one for each mebibyte of text.

    Raises:
        InputError: `cache_dir` cannot be written, or this Python carries no library sources.
    """
    folder = cache_dir / _key(vocab_size)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{folder.name}.lock"):
            if not folder.is_dir():
                _build(folder, vocab_size, on_progress or silent)
    except OSError as error:
        raise InputError(
            f"cannot build the default data in {cache_dir}: {error}; choose another cache"
        ) from error
    return _locate(folder)


def _build(folder: Path, vocab_size: int, on_progress: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as temporary:
        data = _locate(Path(temporary) / "data")
        on_progress(f"training a byte-level BPE of {vocab_size} tokens on the Python standard library")
        train_texts = (document.text for document in documents("train"))
        tokenizer = train_byte_bpe(train_texts, vocab_size, data.tokenizer)
        for split in _SPLITS:
            on_progress(f"tokenizing the {split} split")
            prepare_documents(documents(split), tokenizer, getattr(data, split), on_progress=on_progress)
        data.tokenizer.parent.rename(folder)


def _locate(folder: Path) -> DefaultData:
    return DefaultData(folder / "tokenizer.json", folder / "train", folder / "heldout")


def _key(vocab_size: int) -> str:
    recipe = {
        "recipe": _RECIPE_VERSION,
        "python": platform.python_version(),
        "vocab_size": vocab_size,
        "files": [(name.as_posix(), path.stat().st_size) for path, name in source_files()],
    }
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path` for this process alone; the lock goes with the process, even one that is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
