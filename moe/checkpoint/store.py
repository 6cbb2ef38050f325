"""The folder `checkpoints/`: one `step_NNNNNNNN` per checkpoint, and how it changes without ever lying.

There is no "latest" pointer: the scan of complete checkpoints is the truth. Every change is a rename of a
whole folder, so that a process may be killed at any instant:

    step_NNNNNNNN.partial   being written; never read
    step_NNNNNNNN           complete: it holds a manifest
    step_NNNNNNNN.replaced  complete, set aside while a new save of the same step takes its name
    step_NNNNNNNN.deleting  being deleted; never read
    step_NNNNNNNN.corrupt   set aside by `quarantine` for a person to look at; never read or deleted

One process at a time may change the folder (rank 0); any may read it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from moe.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest, verify
from moe.durable import fsync_directory, storage_error
from moe.errors import CorruptCheckpointError, InputError

_PARTIAL, _REPLACED, _DELETING, _CORRUPT = ".partial", ".replaced", ".deleting", ".corrupt"
_READABLE = re.compile(rf"step_(\d{{8,}})({re.escape(_REPLACED)})?")


def checkpoint_dir(root: Path, step: int) -> Path:
    """The folder of one checkpoint.

    Args:
        root: the folder of all checkpoints of a run.
        step: optimizer steps done, >= 0.

    Returns:
        `root/step_NNNNNNNN`, which need not exist.

    Raises:
        InputError: `step` is negative.
    """
    if step < 0:
        raise InputError(f"a checkpoint's step must be 0 or more, not {step}.")
    return root / f"step_{step:08d}"


def list_complete(root: Path) -> list[Path]:
    """The checkpoints that were written to the end, newest first; their content is not checked.

    Args:
        root: the folder of all checkpoints of a run; it need not exist.

    Returns:
        Folders that hold a manifest. A `.replaced` one follows the one that replaces it.
    """
    if not root.is_dir():
        return []
    complete = [path for path in root.iterdir() if _READABLE.fullmatch(path.name) and _is_complete(path)]
    return sorted(complete, key=lambda path: (_step(path), path.suffix != _REPLACED), reverse=True)


def newest_valid(
    root: Path,
    *,
    on_corrupt: Callable[[Path, CorruptCheckpointError], None],
    candidates: Callable[[Path], list[Path]] = list_complete,
    check: Callable[[Path], Manifest] = verify,
) -> Path:
    """Find the newest checkpoint whose every bit is as written.

    Args:
        root: the folder of all checkpoints of a run.
        on_corrupt: called with each damaged checkpoint that is newer than the result. It may `quarantine` it.
        candidates: lists the complete checkpoints, newest first.
        check: reads a checkpoint, raising CorruptCheckpointError where it is damaged.

    Returns:
        The folder to load from.

    Raises:
        CorruptCheckpointError: every checkpoint is damaged.
        InputError: there is no checkpoint at all, or one cannot be read here.
    """
    found = candidates(root)
    if not found:
        raise InputError(
            f"there is no complete checkpoint in {root}. Check the path, or start with `moe train`."
        )
    for candidate in found:
        try:
            _check_step(candidate, check(candidate).step)
        except CorruptCheckpointError as error:
            on_corrupt(candidate, error)
        else:
            return candidate
    raise CorruptCheckpointError(
        f"none of the {len(found)} checkpoint(s) in {root} is intact. "
        "Restore one from a backup, or start again."
    )


def begin(root: Path, step: int) -> Path:
    """Create the folder that a save writes into.

    Args:
        root: the folder of all checkpoints of a run; created where missing.
        step: optimizer steps done.

    Returns:
        An empty `step_NNNNNNNN.partial`; what a killed save left there is removed.

    Raises:
        InputError: `step` is negative, or the folder cannot be written.
    """
    partial = _sibling(checkpoint_dir(root, step), _PARTIAL)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _delete(partial)
        partial.mkdir()
    except OSError as error:
        raise storage_error(partial, error) from error
    return partial


def finish(partial: Path) -> Path:
    """Give a committed folder its final name; only from then on is it a checkpoint.

    An earlier checkpoint of the same step is set aside first and deleted last, so that one of the two is
    complete at every instant.

    Args:
        partial: what `begin` returned, with a committed manifest.

    Returns:
        The final folder.

    Raises:
        CorruptCheckpointError: the folder has no intact manifest, or that of another step.
        InputError: the folder cannot be renamed.
    """
    final = partial.with_name(partial.name.removesuffix(_PARTIAL))
    _check_step(partial, read_manifest(partial).step)
    replaced = _sibling(final, _REPLACED)
    try:
        if final.exists():
            _delete(replaced)
            _rename(final, replaced)
        _rename(partial, final)
        _delete(replaced)
    except OSError as error:
        raise storage_error(final, error) from error
    return final


def quarantine(checkpoint: Path) -> Path:
    """Set a damaged checkpoint aside, so that retention does not count it as one of those to keep.

    Args:
        checkpoint: a folder that `newest_valid` reported.

    Returns:
        Its new path, `step_NNNNNNNN.corrupt`. An older one of that name is deleted.

    Raises:
        InputError: the folder cannot be renamed.
    """
    aside = checkpoint.with_name(f"step_{_step(checkpoint):08d}{_CORRUPT}")
    try:
        _delete(aside)
        _rename(checkpoint, aside)
    except OSError as error:
        raise storage_error(checkpoint, error) from error
    return aside


def apply_retention(root: Path, keep: int) -> None:
    """Delete the oldest checkpoints beyond `keep`, and what killed saves and deletions left behind.

    Call it while no save is under way: a `.partial` folder is taken for the remains of a killed one.

    Args:
        root: the folder of all checkpoints of a run; it need not exist.
        keep: how many complete checkpoints stay, >= 1.

    Raises:
        InputError: `keep` is less than 1, or a folder cannot be deleted.
    """
    if keep < 1:
        raise InputError(f"keep must be 1 or more checkpoints, not {keep}: a run without one cannot resume.")
    steps_kept = sorted({_step(path) for path in list_complete(root)}, reverse=True)[:keep]
    for path in [*list_complete(root), *root.glob(f"step_*{_PARTIAL}"), *root.glob(f"step_*{_DELETING}")]:
        superseded = path.suffix == _REPLACED and _is_complete(path.with_suffix(""))
        if path.suffix in (_PARTIAL, _DELETING) or superseded or _step(path) not in steps_kept:
            try:
                _delete(path)
            except OSError as error:
                raise storage_error(path, error) from error


def _is_complete(path: Path) -> bool:
    return not path.is_symlink() and (path / MANIFEST_NAME).is_file()


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_").partition(".")[0])


def _sibling(final: Path, suffix: str) -> Path:
    return final.with_name(final.name + suffix)


def _check_step(checkpoint: Path, step: int) -> None:
    if step != _step(checkpoint):
        raise CorruptCheckpointError(
            f"{checkpoint} holds the manifest of step {step}: the folder was renamed or mixed with another. "
            "Use an older checkpoint."
        )


def _rename(source: Path, target: Path) -> None:
    source.rename(target)
    fsync_directory(target.parent)


def _delete(path: Path) -> None:
    """Delete a folder that may not exist; a deletion cut short never looks complete."""
    if not path.exists():
        return
    deleting = path.with_name(path.name.partition(".")[0] + _DELETING)
    if path != deleting:
        if deleting.exists():
            shutil.rmtree(deleting)
        _rename(path, deleting)
    shutil.rmtree(deleting)
