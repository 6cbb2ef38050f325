"""Files that are either complete or as they were, also after a crash, and what to say when the disk is full.

A rename is atomic, but it is durable only after the folder that holds the name was synced; the data is
durable only after the file was. Both are done here, in that order, so that nobody else has to remember.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moe.errors import InputError

TEMPORARY_SUFFIX = ".tmp"

# EFBIG is what RLIMIT_FSIZE and some network file systems answer when a file may not grow.
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its name only when the block succeeds.

    One process at a time may write a path.

    Args:
        path: The final file; missing parent folders are created.

    Yields:
        The open temporary file, to be written in binary.

    Raises:
        OSError: The file cannot be written. Whatever goes wrong, `path` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` (text as UTF-8); a reader sees the old file or the new one, never a part.

    Raises:
        InputError: The file cannot be written; the text says "no space" where that is the cause.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        with atomic_writer(path) as file:
            file.write(data)
    except OSError as error:
        raise storage_error(path, error) from error


def fsync_directory(directory: Path) -> None:
    """Make the names inside `directory` durable.

    Raises:
        OSError: The folder cannot be opened or synced.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(path: Path, error: OSError) -> InputError:
    """Say what failed at `path`; a bare OSError from a write does not carry the path.

    Args:
        path: The file or folder that was being written or synced.
        error: What the operating system answered.

    Returns:
        The error to raise; it names free bytes where the disk is full.
    """
    if error.errno not in _NO_SPACE:
        return InputError(f"cannot store {path}: {error.strerror}. Check the disk and its permissions.")
    return InputError(
        f"no space to store {path}: {error.strerror}, {free_bytes(path):,} bytes are free. "
        "Free some space or quota; what was complete before is intact."
    )


def require_free_space(path: Path, needed_bytes: int) -> None:
    """Refuse a write that cannot fit, before anything is written.

    Quotas and other writers are not seen, so the write may still run out of space later.

    Args:
        path: The folder that will be written; it need not exist yet.
        needed_bytes: What will be written.

    Raises:
        InputError: Fewer bytes are free; the text has the path, the needed and the free bytes.
    """
    available_bytes = free_bytes(path)
    if available_bytes < needed_bytes:
        raise InputError(
            f"no space in {path}: {needed_bytes:,} bytes are needed, {available_bytes:,} are free. "
            "Free some space, keep fewer checkpoints or choose another folder."
        )


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that `path`, which need not exist yet, is or would be on."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free
