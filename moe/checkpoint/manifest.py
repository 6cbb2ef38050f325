"""The manifest: what makes a folder of files a checkpoint.

`manifest.json` lists the size and XXH3-128 of every file of the folder, and is written last, so a folder
without one is not a checkpoint and a folder with one can be checked down to the bit before any weight
changes. Each rank hashes the files that it wrote with `hash_files`; the caller gathers the entries and one
rank commits them. Nothing here communicates.

Damage is what differs from the manifest. A file that cannot be read here says nothing about the checkpoint
(a mount may be missing on this machine), so it is an InputError that names the host.

XXH3 finds damage, not forgery: whoever can write the folder can also write a manifest that fits it.
Method: https://github.com/Cyan4973/xxHash (XXH3, 128 bit), chosen because it hashes at memory speed.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import socket
import stat
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, NoReturn

import xxhash
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from moe.durable import TEMPORARY_SUFFIX, fsync_directory, storage_error, write_atomically
from moe.errors import CorruptCheckpointError, InputError

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1

_SELF_HASH = "manifest_xxh3_128"
_OWN_NAMES = frozenset({MANIFEST_NAME, MANIFEST_NAME + TEMPORARY_SUFFIX})
_REMEDY = "Use an older checkpoint, or copy the named files again from an intact copy."


def _inside_the_folder(name: str) -> str:
    path = PurePosixPath(name)
    plain = name == path.as_posix() and name != "." and "\0" not in name
    if not plain or path.is_absolute() or ".." in path.parts or name in _OWN_NAMES:
        raise ValueError(f"{name!r} is not a plain relative path of a checkpoint file")
    return name


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Frozen):
    """One file of a checkpoint: name relative to its folder, size and hash."""

    name: Annotated[str, AfterValidator(_inside_the_folder)]
    size_bytes: Annotated[int, Field(ge=0)]
    xxh3_128: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class Manifest(_Frozen):
    """Every file of one checkpoint, and the small state (config, layout, data position) beside them."""

    schema_version: int
    step: Annotated[int, Field(ge=0)]
    files: Annotated[tuple[FileEntry, ...], Field(strict=False)]  # JSON has lists only
    state: dict[str, JsonValue]

    def without(self, names: Container[str]) -> list[FileEntry]:
        """The entries of all other files."""
        return [entry for entry in self.files if entry.name not in names]


def hash_files(directory: Path, names: Iterable[str]) -> list[FileEntry]:
    """Hash the files that this process wrote, and make them durable.

    Args:
        directory: the folder of the checkpoint.
        names: POSIX paths relative to `directory`.

    Returns:
        One entry per name, in the order given.

    Raises:
        InputError: a name leaves the folder, or a file cannot be read or synced.
    """
    return [_hash_written(directory, name) for name in names]


def commit_manifest(
    directory: Path, *, step: int, entries: Sequence[FileEntry], state: Mapping[str, JsonValue]
) -> Path:
    """Turn a folder of files into a checkpoint by writing its manifest, last and atomically.

    Args:
        directory: the folder; every file in it must have an entry.
        step: optimizer steps done.
        entries: what `hash_files` returned, gathered from all ranks, in any order.
        state: small JSON that a resume needs.

    Returns:
        The path of the manifest.

    Raises:
        CorruptCheckpointError: an entry is repeated or does not fit the folder, or a file has no entry.
        InputError: `state` is not JSON, or the manifest cannot be written.
    """
    problems = {name: "listed more than once" for name in _repeated(entries)}
    problems |= _misfits(_scan(directory), entries)
    if problems:
        raise damaged(directory, problems)
    content = _content(step, entries, state)
    # The shards' names must be as durable as their bytes before a manifest speaks for them.
    for folder in {(directory / entry.name).parent for entry in entries}:
        fsync_directory(folder)
    write_atomically(directory / MANIFEST_NAME, content)
    return directory / MANIFEST_NAME


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a checkpoint and check it against its own hash, but not the files it lists.

    Args:
        directory: the folder of the checkpoint.

    Returns:
        The validated manifest.

    Raises:
        CorruptCheckpointError: there is none, it is damaged, or an entry leaves the folder.
        InputError: another version of this library wrote it in a form that this one cannot read, or the disk
            fails.
    """
    path = directory / MANIFEST_NAME
    content = _manifest_bytes(path)
    try:
        payload = json.loads(content)
        payload.pop(_SELF_HASH)
        intact = _sealed(payload) == content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"{path} is damaged: it is not a manifest ({error}). {_REMEDY}"
        ) from error
    # Comparing bytes, not values, also refuses the rare flip that JSON would read as the same value.
    if not intact:
        raise CorruptCheckpointError(f"{path} is damaged: it does not match its own hash. {_REMEDY}")
    return _validated(path, payload)


def verify(directory: Path, *, workers: int = 1) -> Manifest:
    """Check that a checkpoint holds exactly the files that its manifest lists, bit for bit.

    Args:
        directory: the folder of the checkpoint.
        workers: threads that hash; hashing releases the interpreter lock.

    Returns:
        The manifest, which is then the truth about the folder.

    Raises:
        CorruptCheckpointError: names every file that is missing, unexpected or a link, or differs in size
            or hash.
        InputError: the manifest's version is not supported, or a file cannot be read.
    """
    manifest, problems = compare_names(directory)
    problems |= wrong_hashes(directory, manifest.without(problems), workers=workers)
    if problems:
        raise damaged(directory, problems)
    return manifest


def compare_names(directory: Path) -> tuple[Manifest, dict[str, str]]:
    """Compare names, kinds and sizes of a checkpoint's files with its manifest; no content is read.

    Args:
        directory: the folder of the checkpoint.

    Returns:
        The manifest, and by name what is wrong with a file.

    Raises:
        CorruptCheckpointError: the manifest itself is missing or damaged.
        InputError: the manifest's version is not supported, or the folder cannot be read.
    """
    manifest = read_manifest(directory)
    return manifest, _misfits(_scan(directory), manifest.files)


def split_by_bytes(entries: Iterable[FileEntry], ranks: int) -> list[list[FileEntry]]:
    """Share whole files among ranks so that each reads about as many bytes, the same way on every rank.

    The largest file left goes to whoever has least (R. L. Graham, 1969, "Bounds on multiprocessing timing
    anomalies"): no rank has more than the mean plus one file.

    Args:
        entries: files, in any order.
        ranks: shares, >= 1.

    Returns:
        A list for each rank, largest file first.
    """
    shares: list[list[FileEntry]] = [[] for _ in range(ranks)]
    load = [(0, rank) for rank in range(ranks)]  # bytes so far; a heap
    for entry in sorted(entries, key=lambda entry: (-entry.size_bytes, entry.name)):
        size_bytes, rank = load[0]
        shares[rank].append(entry)
        heapq.heapreplace(load, (size_bytes + entry.size_bytes, rank))
    return shares


def wrong_hashes(directory: Path, entries: Sequence[FileEntry], *, workers: int) -> dict[str, str]:
    """Hash files and compare them with the manifest.

    Args:
        directory: the folder of the checkpoint.
        entries: the files to read.
        workers: threads that hash, >= 1.

    Returns:
        By name what is wrong with a file; empty where all are as written.

    Raises:
        InputError: a file cannot be read; the text has its path and this host.
    """
    with ThreadPoolExecutor(workers) as pool:
        problems = pool.map(lambda entry: _content_problem(directory / entry.name, entry.xxh3_128), entries)
        return {entry.name: text for entry, text in zip(entries, problems, strict=True) if text}


def damaged(directory: Path, problems: Mapping[str, str]) -> CorruptCheckpointError:
    """The error that names every damaged file of a checkpoint.

    Args:
        directory: the folder of the checkpoint.
        problems: by name what is wrong with a file.
    """
    listed = "\n".join(f"  {name!r}: {problem}" for name, problem in sorted(problems.items()))
    return CorruptCheckpointError(
        f"checkpoint {directory} is damaged in {len(problems)} file(s):\n{listed}\n{_REMEDY}"
    )


def unreadable(path: Path, error: OSError) -> InputError:
    """The error of a file or folder that this machine cannot read, which is no sign of damage.

    Args:
        path: what was to be read.
        error: what the operating system answered.
    """
    return InputError(
        f"host {socket.gethostname()} cannot read {path.absolute()}: {error.strerror}. "
        "Check the file system there. Nothing was renamed; if the checkpoint is lost, move it away."
    )


def _hash_written(directory: Path, name: str) -> FileEntry:
    try:
        size_bytes, digest = _size_and_hash(directory / _inside_the_folder(name), sync=True)
    except OSError as error:
        raise storage_error(directory / name, error) from error
    except ValueError as error:
        raise InputError(f"cannot put a file into checkpoint {directory}: {error}.") from error
    return FileEntry(name=name, size_bytes=size_bytes, xxh3_128=digest)


def _size_and_hash(path: Path, *, sync: bool = False) -> tuple[int, str]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor, not a path
        digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        if sync:
            os.fsync(descriptor)
        return os.fstat(descriptor).st_size, digest


def _scan(directory: Path) -> dict[str, os.stat_result]:
    """Everything below `directory` that is not a folder, the manifest's own files left out."""
    found = {}
    try:
        # Left to itself, os.walk passes over a folder that it cannot list: its files would seem missing.
        for folder, folders, files in os.walk(directory, onerror=_raise):
            # os.walk lists a link to a folder among the folders; it must not pass for one.
            for name in [*files, *(name for name in folders if Path(folder, name).is_symlink())]:
                path = Path(folder, name)
                found[path.relative_to(directory).as_posix()] = path.lstat()
    except OSError as error:
        raise unreadable(directory, error) from error
    return {name: status for name, status in found.items() if name not in _OWN_NAMES}


def _raise(error: OSError) -> NoReturn:
    raise error


def _misfits(found: Mapping[str, os.stat_result], entries: Sequence[FileEntry]) -> dict[str, str]:
    """Where names, kinds and sizes differ between a folder and its entries; no content is read."""
    problems = {
        name: "not listed in the manifest" for name in found.keys() - {entry.name for entry in entries}
    }
    for entry in entries:
        status = found.get(entry.name)
        if status is None:
            problems[entry.name] = "missing"
        elif not stat.S_ISREG(status.st_mode):
            problems[entry.name] = "not a regular file (links are refused)"
        elif status.st_size != entry.size_bytes:
            problems[entry.name] = f"{status.st_size:,} bytes, the manifest says {entry.size_bytes:,}"
    return problems


def _content_problem(path: Path, expected: str) -> str | None:
    try:
        _, digest = _size_and_hash(path)
    except OSError as error:
        raise unreadable(path, error) from error
    return None if digest == expected else f"XXH3-128 is {digest}, the manifest says {expected}"


def _repeated(entries: Sequence[FileEntry]) -> list[str]:
    return [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]


def _content(step: int, entries: Sequence[FileEntry], state: Mapping[str, JsonValue]) -> bytes:
    files = tuple(sorted(entries, key=lambda entry: entry.name))
    try:
        manifest = Manifest(schema_version=SCHEMA_VERSION, step=step, files=files, state=dict(state))
        return _sealed(manifest.model_dump(mode="json"))
    except ValueError as error:
        raise InputError(f"the state of a checkpoint must be JSON with finite numbers: {error}.") from error


def _sealed(payload: Mapping[str, JsonValue]) -> bytes:
    """The only byte form of a manifest: canonical JSON with the hash of the canonical rest."""
    return _canonical({**payload, _SELF_HASH: xxhash.xxh3_128_hexdigest(_canonical(payload))})


def _canonical(payload: Mapping[str, JsonValue]) -> bytes:
    text = json.dumps(payload, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def _manifest_bytes(path: Path) -> bytes:
    if path.is_symlink():
        raise CorruptCheckpointError(f"{path} is a link, which is refused. {_REMEDY}")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"{path} is missing. {_REMEDY}") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _validated(path: Path, payload: Mapping[str, JsonValue]) -> Manifest:
    version = payload.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema version {version!r}, this library reads {SCHEMA_VERSION}. "
            "Load it with the version of joulemoe that wrote it."
        )
    try:
        manifest = Manifest.model_validate(payload)
    except ValidationError as error:
        raise CorruptCheckpointError(f"{path} is not a valid manifest: {error}. {_REMEDY}") from error
    if repeated := _repeated(manifest.files):
        raise CorruptCheckpointError(f"{path} lists {', '.join(repeated)} more than once. {_REMEDY}")
    return manifest
