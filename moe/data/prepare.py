"""Turns text into Megatron token files: PREFIX.bin, PREFIX.idx, and PREFIX.json with the counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moe.data.indexed import IndexedWriter, indexed_writer, sidecar_path
from moe.data.progress import Progress, silent
from moe.data.sources import find_files, read_documents
from moe.data.split import Document
from moe.data.tokenizer import Tokenizer
from moe.durable import atomic_writer
from moe.errors import InputError

_BATCH_CHARACTERS = 1 << 20  # enough documents at once to keep the tokenizer's threads busy


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What was written; also the content of PREFIX.json.

    Attributes:
        documents: Documents written; those without text are left out.
        tokens: Ids written, one end-of-document id for each document among them.
        bytes: UTF-8 bytes of the text.
        vocab_size: Number of ids of the tokenizer.
        tokenizer: Fingerprint of the tokenizer.
        dtype: Storage type of an id, as numpy names it.
    """

    documents: int
    tokens: int
    bytes: int
    vocab_size: int
    tokenizer: str
    dtype: str


def prepare(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    out_prefix: Path,
    *,
    json_key: str = "text",
    on_progress: Progress | None = None,
) -> PrepareReport:
    """Tokenize files into Megatron token files.

    A .jsonl file has one document a line, every other file is one document, and a folder is read recursively
    in sorted order. Files are streamed one document at a time.

    Args:
        inputs: Files and folders.
        tokenizer: Makes the ids.
        out_prefix: Path of the files to write without their endings.
        json_key: Name of the text in a .jsonl object.
        on_progress: Called about once for each mebibyte of text.

    Raises:
        InputError: An input does not exist or there is no text.
        CorruptDataError: A file is empty, not UTF-8, or has a bad JSONL line; the message names file and byte
            offset. Nothing is left half-written, and files of an earlier run stay as they were.
    """
    files = find_files(inputs)
    documents = (document for file in files for document in read_documents(file, json_key))
    return prepare_documents(documents, tokenizer, out_prefix, on_progress=on_progress)


def prepare_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out_prefix: Path,
    *,
    on_progress: Progress | None = None,
) -> PrepareReport:
    """Tokenize documents into Megatron token files, each closed by the end-of-document id.

    Args:
        documents: Read once; documents without text are left out.
        tokenizer: Makes the ids.
        out_prefix: Path of the files to write without their endings.
        on_progress: Called about once for each mebibyte of text.

    Raises:
        InputError: No document has any text, or the files cannot be written.
    """
    try:
        with indexed_writer(out_prefix, tokenizer.vocab_size) as writer:
            text_bytes = _write(documents, tokenizer, writer, on_progress or silent)
            if not writer.documents:
                raise InputError(f"nothing to write to {out_prefix}: no document has any text")
            # From here to the last line the files may be of two runs: no sidecar vouches for them.
            sidecar_path(out_prefix).unlink(missing_ok=True)
        report = PrepareReport(
            documents=writer.documents,
            tokens=writer.tokens,
            bytes=text_bytes,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.fingerprint,
            dtype=writer.dtype.name,
        )
        with atomic_writer(sidecar_path(out_prefix)) as file:
            file.write(json.dumps(asdict(report), indent=2).encode() + b"\n")
    except OSError as error:
        raise InputError(f"cannot write {out_prefix}: {error.strerror}; choose another output") from error
    return report


def _write(
    documents: Iterable[Document], tokenizer: Tokenizer, writer: IndexedWriter, on_progress: Progress
) -> int:
    """Write every document and return the UTF-8 bytes of their text."""
    text_bytes = 0
    for texts in _batches(documents):
        for ids in tokenizer.encode_batch(texts):
            writer.add_document([*ids, tokenizer.eod])
        text_bytes += sum(len(text.encode()) for text in texts)
        on_progress(f"{writer.documents} documents, {text_bytes / 1e6:.1f} MB, {writer.tokens} tokens")
    return text_bytes


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for document in documents:
        if document.text:
            texts.append(document.text)
            characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts
