"""Writes Megatron's token files: PREFIX.bin holds the ids, PREFIX.idx says where each document lies.

Layout of the .idx file, little-endian (megatron.core.datasets.indexed_dataset): 9 bytes of magic, u64
version, u8 dtype code, u64 number of sequences, u64 number of document indices; then int32 lengths in tokens,
int64 byte offsets into the .bin, and int64 document indices, from 0 on. Here a document is one sequence.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from moe.durable import atomic_writer

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
# Integer types only; 6 and 7 are Megatron's floats, which cannot be token ids.
DTYPE_OF_CODE: dict[int, npt.DTypeLike] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_UINT16_VOCAB = 65500  # below this many ids Megatron stores 16 bits


def token_dtype(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.int32]:
    """Storage type that Megatron gives to ids of a vocabulary of `vocab_size`."""
    return np.dtype(np.uint16) if vocab_size < _UINT16_VOCAB else np.dtype(np.int32)


def bin_path(prefix: Path) -> Path:
    """File of token ids; `prefix` may itself contain dots."""
    return prefix.with_name(f"{prefix.name}.bin")


def idx_path(prefix: Path) -> Path:
    """File of document positions."""
    return prefix.with_name(f"{prefix.name}.idx")


def sidecar_path(prefix: Path) -> Path:
    """File of counts and of the tokenizer's fingerprint, ours and not Megatron's."""
    return prefix.with_name(f"{prefix.name}.json")


class IndexedWriter:
    """Appends documents to an open .bin file and remembers where each lies.

    Attributes:
        dtype: Storage type of an id.
        documents: Number of documents written so far.
        tokens: Number of ids written so far.
    """

    def __init__(self, file: BinaryIO, dtype: np.dtype[np.uint16] | np.dtype[np.int32]) -> None:
        self._file = file
        self._lengths = array("i")
        self.dtype = dtype
        self.documents = 0
        self.tokens = 0

    def add_document(self, ids: Sequence[int]) -> None:
        """Append one document, its end-of-document id included."""
        self._file.write(np.asarray(ids, dtype=self.dtype).tobytes())
        self._lengths.append(len(ids))
        self.documents += 1
        self.tokens += len(ids)

    def index(self) -> bytes:
        """Content of the .idx file for what was written so far."""
        lengths = np.asarray(self._lengths, dtype=np.int32)
        ends_bytes = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        pointers = np.concatenate([np.zeros(1, np.int64), ends_bytes])[: lengths.size]
        documents = np.arange(lengths.size + 1, dtype=np.int64)
        code = next(code for code, dtype in DTYPE_OF_CODE.items() if dtype == self.dtype)
        header = HEADER.pack(MAGIC, VERSION, code, lengths.size, documents.size)
        return b"".join([header, lengths.tobytes(), pointers.tobytes(), documents.tobytes()])


@contextmanager
def indexed_writer(prefix: Path, vocab_size: int) -> Iterator[IndexedWriter]:
    """Write PREFIX.bin and PREFIX.idx; if the block raises, files of an earlier run stay as they were.

    Args:
        prefix: Path of both files without their ending.
        vocab_size: Number of ids of the tokenizer; decides the storage type.

    Raises:
        OSError: The files cannot be written.
    """
    with atomic_writer(idx_path(prefix)) as idx_file, atomic_writer(bin_path(prefix)) as bin_file:
        writer = IndexedWriter(bin_file, token_dtype(vocab_size))
        yield writer
        idx_file.write(writer.index())
        idx_file.flush()  # a full disk must show before the .bin takes its name
