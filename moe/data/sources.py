"""Reads text files, JSONL files and folders as documents, and refuses what is damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe.data.split import Document
from moe.errors import CorruptDataError, InputError

JSONL_SUFFIX = ".jsonl"
# In a folder only these are read; a file named by the user is read whatever its ending.
TEXT_SUFFIXES = frozenset({
    ".txt", ".md", ".rst", ".tex", ".org", ".html", ".xml", ".csv", ".json", ".yaml", ".yml", ".toml",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".kt", ".scala",
    ".js", ".ts", ".rb", ".pl", ".php", ".sh", ".sql", ".r", ".jl", ".lua", ".hs", ".ml", ".swift", ".cs",
})  # fmt: skip
_LEGITIMATELY_EMPTY = frozenset({"__init__.py"})  # empty by convention, not by a failed download


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """List the files to read: files as given, folders recursively in sorted order.

    Args:
        inputs: Files and folders.

    Returns:
        The files, in the order of `inputs`.

    Raises:
        InputError: An input does not exist, or a folder holds no text.
        CorruptDataError: A file is empty.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += _text_files(path)
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"input {path} does not exist; give a text file, a .jsonl file or a folder")
    for path in files:
        if path.stat().st_size == 0:
            raise CorruptDataError(f"{path} is empty (0 bytes); remove it or write it again")
    return files


def read_documents(path: Path, json_key: str) -> Iterator[Document]:
    """Yield the documents of one file: each line of a .jsonl file, or the whole of any other.

    Args:
        path: The file.
        json_key: Name of the text in an object of a .jsonl file.

    Raises:
        InputError: The file cannot be read.
        CorruptDataError: A byte is not UTF-8, or a line is not an object with text under `json_key`; the
            message has the file, the byte offset in it, and the line of a .jsonl file.
    """
    try:
        if path.suffix == JSONL_SUFFIX:
            yield from _read_jsonl(path, json_key)
        else:
            yield Document(str(path), _decode(path.read_bytes(), str(path), offset_bytes=0))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _text_files(folder: Path) -> list[Path]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in TEXT_SUFFIXES | {JSONL_SUFFIX}
        and path.is_file()
        and not (path.name in _LEGITIMATELY_EMPTY and path.stat().st_size == 0)
    ]
    if not files:
        raise InputError(f"folder {folder} holds no text; it needs files such as .txt, .md, .py or .jsonl")
    return files


def _read_jsonl(path: Path, json_key: str) -> Iterator[Document]:
    offset_bytes = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            if line.strip():
                text = _decode(line, place, offset_bytes)
                yield Document(f"{path}:{number}", _json_text(text, json_key, place, offset_bytes))
            offset_bytes += len(line)


def _json_text(line: str, json_key: str, place: str, offset_bytes: int) -> str:
    at = f"{place} (byte offset {offset_bytes})"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorruptDataError(f"{at}: not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise CorruptDataError(f"{at}: JSON is nested too deeply to read") from error
    if not isinstance(record, dict):
        raise CorruptDataError(f'{at}: expected an object such as {{"{json_key}": "..."}}')
    if json_key not in record:
        raise CorruptDataError(
            f'{at}: no key "{json_key}"; it has {_shorten(sorted(record))}; see --json-key'
        )
    text = record[json_key]
    if not isinstance(text, str):
        raise CorruptDataError(f'{at}: "{json_key}" is {type(text).__name__}, expected text')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone half of a \ud83d\ude00 pair
        raise CorruptDataError(f'{at}: "{json_key}" has a surrogate without its pair') from error
    return text


def _decode(data: bytes, place: str, offset_bytes: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CorruptDataError(
            f"{place}: byte 0x{data[error.start]:02x} at byte offset {offset_bytes + error.start} is not "
            "UTF-8; convert the file to UTF-8"
        ) from error


def _shorten(names: list[str]) -> str:
    shown = ", ".join(f'"{name[:40]}"' for name in names[:8]) or "no keys"
    return f"{shown}, ..." if len(names) > 8 else shown
