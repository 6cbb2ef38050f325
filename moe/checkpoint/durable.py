"""Writes that survive a crash, and what to say when the disk is full.

A rename is atomic, but it is durable only after the folder that holds the name was synced; the data is
durable only after the file was. Both are done here, in that order, so that nobody else has to remember.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from moe.errors import InputError

TEMPORARY_SUFFIX = ".tmp"

# EFBIG is what RLIMIT_FSIZE and some network file systems answer when a file may not grow.
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def fsync_directory(directory: Path) -> None:
    """Make the names inside `directory` durable.

    Args:
        directory: an existing folder.

    Raises:
        OSError: the folder cannot be opened or synced.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a crash leaves the old file or the new one, never a part.

    Args:
        path: the final name; the temporary one lies beside it.
        data: the whole content.

    Raises:
        InputError: the file cannot be written; the text says "no space" where that is the cause.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise storage_error(path, error) from error


def storage_error(path: Path, error: OSError) -> InputError:
    """Say what failed at `path`; a bare OSError from a write does not carry the path.

    Args:
        path: the file or folder that was being written or synced.
        error: what the operating system answered.

    Returns:
        The error to raise; it names free bytes where the disk is full.
    """
    if error.errno not in _NO_SPACE:
        return InputError(f"cannot store {path}: {error.strerror}. Check the disk and its permissions.")
    return InputError(
        f"no space to store {path}: {error.strerror}, {_free_bytes(path):,} bytes are free. "
        "Free some space or quota; the checkpoints before it are intact."
    )


def require_free_space(path: Path, needed_bytes: int) -> None:
    """Refuse a save that cannot fit, before anything is written.

    Quotas and other writers are not seen, so a save may still run out of space later.

    Args:
        path: the folder that will be written; it need not exist yet.
        needed_bytes: what the save will write, in bytes.

    Raises:
        InputError: fewer bytes are free; the text has the path, the needed and the free bytes.
    """
    free_bytes = _free_bytes(path)
    if free_bytes < needed_bytes:
        raise InputError(
            f"no space for a checkpoint in {path}: it needs {needed_bytes:,} bytes, {free_bytes:,} are free. "
            "Free some space, keep fewer checkpoints or choose another folder."
        )


def _free_bytes(path: Path) -> int:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free
