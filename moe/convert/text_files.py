"""The small files of a Hugging Face folder that no tensor needs: tokenizer, chat template, generation.

They are copied byte for byte and never interpreted. Python files of a folder are not copied: code stays where
its reader chose to trust it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moe.durable import write_atomically
from moe.errors import InputError

NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
# The largest published tokenizers take some 35 MB; more is no tokenizer.
_MOST_BYTES = 2**28


def text_files_of(folder: Path) -> list[Path]:
    """Those that a folder has.

    Raises:
        InputError: one is no plain file, a link out of the folder, or too large for what it is called.
    """
    found = [folder / name for name in NAMES if (folder / name).is_symlink() or (folder / name).exists()]
    for path in found:
        _require_plain(path)
    return found


def copy_text_files(files: Iterable[Path], folder: Path) -> None:
    """Copy them, byte for byte.

    Args:
        files: from `text_files_of`.
        folder: exists.

    Raises:
        OSError: one cannot be read or written.
    """
    for path in files:
        write_atomically(folder / path.name, path.read_bytes())


def _require_plain(path: Path) -> None:
    folder = path.parent.resolve()
    target = path.resolve()
    # In the hub's cache models--NAME/snapshots/REVISION/tokenizer.json is a link to models--NAME/blobs/HASH.
    homes = [folder] + ([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(home) for home in homes):
        raise InputError(
            f"{path} is a link to {target}, outside the folder; put a copy there, or remove the link"
        )
    if not target.is_file():
        raise InputError(f"{path} is no plain file; replace or remove it")
    if target.stat().st_size > _MOST_BYTES:
        raise InputError(
            f"{path} has {target.stat().st_size:,} bytes, more than any tokenizer; remove or replace it"
        )
