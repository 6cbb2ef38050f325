"""Train and held-out documents that share no long run of words.

A held-out loss means something only if the text was not seen in training. Documents are split by a hash of
their name, and then every held-out line that takes part in a run of 13 words found anywhere in the training
text is cut out. 13 is the length used to look for contamination by GPT-3 (Brown et al. 2020, appendix C).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

HELDOUT_PERCENT = 5
GRAM_WORDS = 13

# Words between spaces. Japanese has none: a run of one script (hiragana, katakana, kanji) is a word there.
_WORD = re.compile(
    r"[\u3041-\u309f]+|[\u30a0-\u30ff]+|[\u3400-\u9fff々]+|[^\s\u3041-\u309f\u30a0-\u30ff\u3400-\u9fff々]+"
)
_HASH_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses no information modulo 2**64


@dataclass(frozen=True, slots=True)
class Document:
    """One text that belongs together; `name` identifies it within its corpus."""

    name: str
    text: str


def is_heldout(name: str) -> bool:
    """Say whether the document `name` is held out: the same answer everywhere, for about 5 % of names."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELDOUT_PERCENT


def drop_overlap(heldout: Iterable[Document], train: Iterable[Document]) -> list[Document]:
    """Cut the lines out of held-out documents that share a run of 13 words with the training text.

    What is left of a document between two cuts becomes a document of its own, so that no new run of words
    arises across a cut. Pieces of fewer than 13 words are dropped. Runs are compared by a 64-bit hash: two
    equal runs always meet, and a chance collision only removes a line too many.

    Args:
        heldout: Documents to clean; kept in memory.
        train: Documents to compare with; read once, one at a time.

    Returns:
        The clean pieces, named as their document, with `#1`, `#2`, ... appended where one was cut.
    """
    documents = list(heldout)
    # Words that are in no held-out document share the number 0: they cannot be part of a match.
    numbers = {word: 0 for document in documents for word in _WORD.findall(document.text)}
    numbers |= {word: number for number, word in enumerate(numbers, start=1)}
    grams = [_gram_hashes(document.text, numbers) for document in documents]
    known = np.unique(np.concatenate(grams)) if grams else np.empty(0, np.uint64)
    in_train = np.zeros(known.size, dtype=bool)
    for document in train:
        seen = _gram_hashes(document.text, numbers)
        in_train |= np.isin(known, seen)
    return [
        piece
        for document, hashes in zip(documents, grams, strict=True)
        for piece in _clean_pieces(document, in_train[np.searchsorted(known, hashes)])
    ]


def _gram_hashes(text: str, numbers: dict[str, int]) -> npt.NDArray[np.uint64]:
    """Hash every run of 13 words of `text` (polynomial in the word numbers); shape [max(words - 12, 0)]."""
    words = np.array([numbers.get(word, 0) for word in _WORD.findall(text)], dtype=np.uint64)
    runs = max(words.size - GRAM_WORDS + 1, 0)
    hashes = np.zeros(runs, dtype=np.uint64)
    for position in range(GRAM_WORDS):
        hashes = hashes * _HASH_BASE + words[position : position + runs]
    return hashes


def _clean_pieces(document: Document, gram_in_train: npt.NDArray[np.bool_]) -> Iterator[Document]:
    """Yield the runs of lines of `document` that no marked run of 13 words touches."""
    if not gram_in_train.any():
        if gram_in_train.size:
            yield document
        return
    word_is_bad = np.convolve(gram_in_train, np.ones(GRAM_WORDS, dtype=np.int64)) > 0
    lines = document.text.splitlines(keepends=True)
    words_per_line = [len(_WORD.findall(line)) for line in lines]
    ends = np.cumsum(words_per_line)
    bad = [
        bool(word_is_bad[end - count : end].any()) for end, count in zip(ends, words_per_line, strict=True)
    ]
    number = 0
    for is_bad, run in groupby(range(len(lines)), key=bad.__getitem__):
        piece = list(run)
        if not is_bad and sum(words_per_line[line] for line in piece) >= GRAM_WORDS:
            number += 1
            yield Document(f"{document.name}#{number}", "".join(lines[line] for line in piece))
