"""The default corpus: the Python standard library that every installation carries.

About 10 MB of real text with no download: the sources, and the language reference that `help()` prints
(`pydoc_data/topics.py`), each of whose topics is a document.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from moe.data.split import Document, drop_overlap, is_heldout
from moe.errors import InputError

# Tests and caches; what the user installed; character tables of `encodings`, which are numbers and not text.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "encodings"}
)
# Written at build time of this Python: they differ between machines and hold its paths.
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
_TOPICS = Path("pydoc_data", "topics.py")
_MIN_FILES = 100  # a whole standard library has about 550; fewer means zipped or stripped


def source_files() -> list[tuple[Path, Path]]:
    """List the files of the corpus.

    Returns:
        Pairs of (path, path relative to the standard library), sorted by the latter.

    Raises:
        InputError: This Python carries no standard library sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if _is_wanted(name)]
        found += [Path(folder, name) for name in files if name.endswith(".py") and _is_wanted(name)]
    if len(found) < _MIN_FILES:
        raise InputError(
            f"only {len(found)} Python sources under {root}, too few for the default corpus; "
            "install a full Python or set data.train to your own prepared text"
        )
    return sorted(((path, path.relative_to(root)) for path in found), key=lambda pair: pair[1].as_posix())


def documents(split: Literal["train", "heldout"]) -> Iterator[Document]:
    """Yield the documents of one split, in a fixed order.

    The split is by a hash of the document's name (about 5 % held out), and no run of 13 words of a held-out
    document occurs in the training documents (see `moe.data.split`).

    Raises:
        InputError: This Python carries no standard library sources.
    """
    if split == "train":
        return _split(heldout=False)
    return iter(drop_overlap(_split(heldout=True), _split(heldout=False)))


def _split(*, heldout: bool) -> Iterator[Document]:
    return (document for document in _all_documents() if is_heldout(document.name) == heldout)


def _all_documents() -> Iterator[Document]:
    for path, name in source_files():
        with tokenize.open(path) as file:  # honours the encoding that a source declares
            text = file.read()
        if name == _TOPICS:
            yield from _topics(text)
        elif text:
            yield Document(name.as_posix(), text)


def _topics(source: str) -> Iterator[Document]:
    """Yield each entry of the one dictionary literal that `pydoc_data/topics.py` assigns."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign):
            topics: dict[str, str] = ast.literal_eval(statement.value)
            for topic, text in sorted(topics.items()):
                yield Document(f"{_TOPICS.as_posix()}#{topic}", text)


def _is_wanted(name: str) -> bool:
    return name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)
