"""Tokenizers: UTF-8 bytes, or any Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moe.durable import atomic_writer
from moe.errors import InputError

EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>")
_NUM_BYTES = 256
_BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE_MARK = "\u2581"  # how SentencePiece vocabularies write a space


class _Codec(Protocol):
    """What `Tokenizer` needs of a vocabulary."""

    vocab_size: int
    eod: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_bytes(self) -> npt.NDArray[np.int32]: ...


class Tokenizer:
    """Text to token ids and back; control tokens never arise from text.

    Attributes:
        vocab_size: Number of ids; every id that `encode` gives, and `eod`, is below it.
        eod: Id of the end-of-document token, which closes every prepared document.
        fingerprint: Hash of the definition; equal fingerprints give equal ids.
    """

    def __init__(self, codec: _Codec, fingerprint: str) -> None:
        self._codec = codec
        self.vocab_size: int = codec.vocab_size
        self.eod: int = codec.eod
        self.fingerprint: str = fingerprint

    @classmethod
    def load(cls, spec: str | Path) -> Tokenizer:
        """Load a tokenizer.

        Args:
            spec: "bytes" (one id a byte, then the end-of-document id), or the path of a `tokenizer.json`.

        Raises:
            InputError: The file is absent, is not a tokenizer, or has no end-of-document token.
        """
        if spec == "bytes":
            return cls(_ByteCodec(), _fingerprint({"type": "bytes", "version": 1}))
        path = Path(spec)
        try:
            definition = json.loads(path.read_bytes())
        except OSError as error:
            raise InputError(
                f'cannot read tokenizer {path}: {error.strerror}; give "bytes" or a tokenizer.json'
            ) from error
        except ValueError as error:  # bad UTF-8 or bad JSON
            raise InputError(f"tokenizer {path} is not JSON: {error}") from error
        return cls(_JsonCodec(definition, path), _fingerprint(definition))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-document id."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, computed in parallel where the vocabulary can."""
        return self._codec.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control tokens stand for nothing, an incomplete character becomes U+FFFD."""
        return self._codec.decode([int(token) for token in ids])

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Count the UTF-8 bytes that each id stands for, which bits per byte are computed from.

        Exact for "bytes" and byte-level BPE: over the ids of a text they sum to its length in bytes (after
        the tokenizer's own normalisation, if it has one). For a SentencePiece vocabulary the space that it
        puts before a document counts too.

        Returns:
            Shape [vocab_size]; bytes; 0 for control tokens and for ids without a token.

        Raises:
            InputError: The vocabulary is of another kind, whose bytes cannot be told from its tokens.
        """
        return self._codec.token_bytes()


def train_byte_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Train a byte-level BPE and write its `tokenizer.json`; the same texts give the same file.

    Args:
        texts: Training text.
        vocab_size: Number of ids, with the end-of-document token and the 256 bytes among them.
        path: The file to write; it is complete or absent.

    Raises:
        InputError: `vocab_size` is too small to hold every byte.
    """
    smallest = _NUM_BYTES + 1
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size {vocab_size} cannot hold 256 bytes and {EOD_TOKENS[0]}; use {smallest} or more"
        )
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKENS[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    with atomic_writer(path) as file:
        file.write(backend.to_str(pretty=True).encode())
    return Tokenizer.load(path)


class _ByteCodec:
    """Ids 0 to 255 are bytes, 256 ends a document."""

    vocab_size = _NUM_BYTES + 1
    eod = _NUM_BYTES

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token != self.eod).decode(errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int32]:
        counts = np.ones(self.vocab_size, dtype=np.int32)
        counts[self.eod] = 0
        return counts


class _JsonCodec:
    """A vocabulary that the `tokenizers` library runs."""

    def __init__(self, definition: dict[str, Any], path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(json.dumps(definition))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path} is not a Hugging Face tokenizer: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        # Text that spells a control token is text: a document must not be able to end itself.
        backend.encode_special_tokens = True
        self._backend = backend
        self._definition = definition
        self._path = path
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have gaps
        self.eod = self._find_eod(vocabulary)

    def _find_eod(self, vocabulary: dict[str, int]) -> int:
        for token in EOD_TOKENS:
            if token in vocabulary:
                return vocabulary[token]
        raise InputError(
            f"tokenizer {self._path} has no end-of-document token; add one of {', '.join(EOD_TOKENS)}"
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [item.ids for item in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text

    def token_bytes(self) -> npt.NDArray[np.int32]:
        length_bytes = self._length_rule()
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            counts[index] = length_bytes(token)
        for index, added in self._backend.get_added_tokens_decoder().items():
            counts[index] = 0 if added.special else len(added.content.encode())
        return counts

    def _length_rule(self) -> Callable[[str], int]:
        decoder = json.dumps(self._definition.get("decoder"))
        if '"ByteLevel"' in decoder:
            return len  # one character of a token stands for one byte
        if '"Metaspace"' in decoder or '"ByteFallback"' in decoder:
            return _sentencepiece_bytes
        raise InputError(
            f"tokenizer {self._path} is neither byte-level nor SentencePiece, so bits per byte are unknown; "
            "use a byte-level BPE"
        )


def _sentencepiece_bytes(token: str) -> int:
    return 1 if _BYTE_FALLBACK.fullmatch(token) else len(token.replace(_SPACE_MARK, " ").encode())


def _fingerprint(definition: dict[str, Any]) -> str:
    canonical = json.dumps(definition, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]
