"""Checks token files before the first step, so that damage is found by name and not as a strange loss."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe.data.indexed import DTYPE_OF_CODE, HEADER, MAGIC, VERSION, bin_path, idx_path, sidecar_path
from moe.errors import CorruptDataError, InputError

_SCAN_TOKENS = 1 << 22  # ids looked at together: large enough for memory speed, small in memory
_REMEDY = "prepare the data again with `moe data prepare`"


@dataclass(frozen=True, slots=True)
class PrefixInfo:
    """What a valid pair of token files holds; `text_bytes` and `tokenizer` are None without a sidecar."""

    documents: int
    tokens: int
    dtype: str
    text_bytes: int | None
    tokenizer: str | None


@dataclass(frozen=True, slots=True)
class _Index:
    """The arrays of an .idx file: lengths and byte offsets a sequence, and the document indices."""

    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]


def validate_prefix(prefix: Path, tokenizer: str | None = None) -> PrefixInfo:
    """Check that PREFIX.bin and PREFIX.idx belong together: layout and sizes; `check_ids` reads the tokens.

    Args:
        prefix: Path of the files without their endings.
        tokenizer: Fingerprint that the sidecar must name, if there is a sidecar; None skips this check.

    Returns:
        What the files hold.

    Raises:
        InputError: A file is absent, or the data was made with another tokenizer.
        CorruptDataError: A file is damaged; the message names it, with the byte offset.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise InputError(f"data file {path} does not exist; {_REMEDY} or correct the path")
    index = _read_index(idx_path(prefix))
    _check_layout(index, idx_path(prefix))
    _check_bin_size(index, bin_path(prefix))
    sidecar = _read_sidecar(sidecar_path(prefix))
    tokens = int(index.lengths.sum(dtype=np.int64))
    if sidecar is not None:
        _check_sidecar(sidecar, sidecar_path(prefix), tokens, tokenizer)
    return PrefixInfo(
        documents=index.documents.size - 1,
        tokens=tokens,
        dtype=index.dtype.name,
        text_bytes=sidecar["bytes"] if sidecar else None,
        tokenizer=sidecar["tokenizer"] if sidecar else None,
    )


def check_ids(prefix: Path, vocab_size: int, *, share: tuple[int, int] = (0, 1)) -> None:
    """Check the token ids of files that `validate_prefix` found whole.

    Args:
        prefix: Path of the files without their endings.
        vocab_size: Number of ids that the model knows.
        share: (k, n) reads the k-th of n equal parts, for trillions of tokens are too many for one rank.

    Raises:
        InputError: This machine cannot read the files.
        CorruptDataError: An id is outside the vocabulary; the message names file and byte offset.
    """
    path = bin_path(prefix)
    try:
        dtype = _read_index(idx_path(prefix)).dtype
        ids = np.memmap(path, dtype, "r")
    except OSError as error:
        raise InputError(
            f"host {socket.gethostname()} cannot read data file {path}: {error.strerror}; every machine of a "
            "job must see the same files"
        ) from error
    part, parts = share
    first, end = ids.size * part // parts, ids.size * (part + 1) // parts
    for start in range(first, end, _SCAN_TOKENS):
        chunk = ids[start : min(start + _SCAN_TOKENS, end)]
        if chunk.max() < vocab_size and chunk.min() >= 0:
            continue
        position = start + int(((chunk >= vocab_size) | (chunk < 0)).argmax())
        raise CorruptDataError(
            f"{path}: token id {int(ids[position])} at byte offset {position * dtype.itemsize} is outside "
            f"the vocabulary, 0 to {vocab_size - 1}; prepare the data with the model's tokenizer"
        )


def _read_index(path: Path) -> _Index:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise CorruptDataError(
            f"{path} is truncated: {size_bytes} bytes, its header alone has {HEADER.size}; {_REMEDY}"
        )
    magic, version, code, sequences, documents = HEADER.unpack(header)
    if magic != MAGIC:
        raise CorruptDataError(f"{path}: bad magic {magic!r} at byte offset 0, expected {MAGIC!r}; {_REMEDY}")
    if version != VERSION:
        raise CorruptDataError(
            f"{path}: version {version} at byte offset 9, only {VERSION} is known; {_REMEDY}"
        )
    if code not in DTYPE_OF_CODE:
        raise CorruptDataError(f"{path}: dtype code {code} at byte offset 17 is no integer type; {_REMEDY}")
    expected_bytes = HEADER.size + 12 * sequences + 8 * documents
    if size_bytes != expected_bytes:
        raise CorruptDataError(
            f"{path}: {size_bytes} bytes, but {sequences} sequences and {documents} document indices (byte "
            f"offset 18) need {expected_bytes}; {_REMEDY}"
        )
    if not sequences:
        raise CorruptDataError(f"{path}: no data, 0 sequences at byte offset 18; {_REMEDY}")
    return _Index(
        np.dtype(DTYPE_OF_CODE[code]),
        np.memmap(path, np.int32, "r", HEADER.size, (sequences,)),
        np.memmap(path, np.int64, "r", HEADER.size + 4 * sequences, (sequences,)),
        np.memmap(path, np.int64, "r", HEADER.size + 12 * sequences, (documents,)),
    )


def _check_layout(index: _Index, path: Path) -> None:
    """Check that sequences follow each other without gaps and that documents cover all of them."""
    lengths_at = HEADER.size
    pointers_at = lengths_at + index.lengths.nbytes
    documents_at = pointers_at + index.pointers.nbytes
    _refuse_first(index.lengths < 0, path, lengths_at, 4, "a negative length")
    ends_bytes = np.cumsum(index.lengths, dtype=np.int64) * index.dtype.itemsize
    starts_bytes = np.concatenate([np.zeros(1, np.int64), ends_bytes[:-1]])
    _refuse_first(
        index.pointers != starts_bytes, path, pointers_at, 8, "an offset that is not the sum of the lengths"
    )
    if ends_bytes[-1] == 0:
        raise CorruptDataError(f"{path}: no data, every length from byte offset {lengths_at} is 0; {_REMEDY}")
    documents = index.documents
    if documents.size < 2 or documents[0] != 0 or documents[-1] != index.lengths.size:
        raise CorruptDataError(
            f"{path}: document indices at byte offset {documents_at} do not run from 0 to "
            f"{index.lengths.size}; {_REMEDY}"
        )
    _refuse_first(np.diff(documents) < 0, path, documents_at + 8, 8, "a document index that goes backwards")


def _refuse_first(
    bad: npt.NDArray[np.bool_], path: Path, start_bytes: int, item_bytes: int, what: str
) -> None:
    if bad.any():
        number = int(bad.argmax())
        raise CorruptDataError(
            f"{path}: {what}, entry {number} at byte offset {start_bytes + number * item_bytes}; {_REMEDY}"
        )


def _check_bin_size(index: _Index, path: Path) -> None:
    expected_bytes = int(index.lengths.sum(dtype=np.int64)) * index.dtype.itemsize
    actual_bytes = path.stat().st_size
    if actual_bytes != expected_bytes:
        kind = "truncated" if actual_bytes < expected_bytes else "too long"
        raise CorruptDataError(
            f"{path} is {kind}: {actual_bytes} bytes, its .idx needs {expected_bytes} (they part at byte "
            f"offset {min(actual_bytes, expected_bytes)}); {_REMEDY}"
        )


def _read_sidecar(path: Path) -> dict[str, Any] | None:
    if not path.is_file():  # data made by Megatron's own tools has none
        return None
    try:
        sidecar = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptDataError(f"{path} is not JSON: {error}; {_REMEDY}") from error
    kinds = {"tokens": int, "bytes": int, "tokenizer": str}
    for key, kind in kinds.items():
        if not isinstance(sidecar, dict) or not isinstance(sidecar.get(key), kind):
            raise CorruptDataError(f"{path} lacks {key} ({kind.__name__}); {_REMEDY}")
    checked: dict[str, Any] = sidecar
    return checked


def _check_sidecar(sidecar: dict[str, Any], path: Path, tokens: int, tokenizer: str | None) -> None:
    if sidecar["tokens"] != tokens:
        raise CorruptDataError(
            f"{path} says {sidecar['tokens']} tokens, the .idx beside it {tokens}: they are of two runs; "
            f"{_REMEDY}"
        )
    if tokenizer is not None and sidecar["tokenizer"] != tokenizer:
        raise InputError(
            f"{path} was made with tokenizer {sidecar['tokenizer']}, the run uses {tokenizer}; prepare the "
            "data with this tokenizer or set data.tokenizer to the other one"
        )
