"""Fetches a Japanese and English corpus from Debian packages: handbooks and the help of an office suite.

The packages come through apt, which checks their signatures, and are unpacked without installing anything and
without being root. Their licences (GPL-2+ or CC-BY-SA-3.0, GPL-2+, MPL-2.0) are kept beside the text.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe.data.html_text import is_english_prose, is_japanese_prose, visible_lines
from moe.data.progress import Progress, silent
from moe.data.split import Document, drop_overlap, is_heldout
from moe.durable import atomic_writer
from moe.errors import InputError

PACKAGES = (
    "debian-handbook",
    "debian-reference-ja",
    "debian-reference-en",
    "libreoffice-help-ja",
    "libreoffice-help-en-us",
)
_TOOLS = ("apt-get", "dpkg-deb")


@dataclass(frozen=True, slots=True)
class _Language:
    """Where the pages of a language lie under the unpacked packages, and which of their lines to keep."""

    code: str
    patterns: tuple[str, ...]
    is_prose: Callable[[str], bool]


_LANGUAGES = (
    _Language(
        "ja",
        (
            "usr/share/doc/debian-handbook/html/ja-JP/*.html",
            "usr/share/debian-reference/*.ja.html",
            "usr/share/libreoffice/help/ja/text/**/*.html",
        ),
        is_japanese_prose,
    ),
    _Language(
        "en",
        (
            "usr/share/doc/debian-handbook/html/en-US/*.html",
            "usr/share/debian-reference/*.en.html",
            "usr/share/libreoffice/help/en-US/text/**/*.html",
        ),
        is_english_prose,
    ),
)
_LANGUAGE_IN_PATH = re.compile(r"(?<=[/.])(ja-JP|en-US|ja|en)(?=[/.])")


@dataclass(frozen=True, slots=True)
class WrittenText:
    """One .jsonl file of the corpus."""

    path: Path
    documents: int
    text_bytes: int


@dataclass(frozen=True, slots=True)
class FetchReport:
    """What `fetch_handbook` wrote."""

    texts: tuple[WrittenText, ...]
    licences: tuple[Path, ...]


def fetch_handbook(out_dir: Path, *, on_progress: Progress | None = None) -> FetchReport:
    """Download the packages and write the corpus, one .jsonl a language and split, and the licences.

    About 44 MB of packages become 7 MB of prose. No other function of `moe.data` uses the network.

    Args:
        out_dir: Receives `ja.train.jsonl`, `ja.heldout.jsonl`, `en.train.jsonl`, `en.heldout.jsonl` and
            `licences/<package>.txt`; created if absent.
        on_progress: Receives a line a stage.

    Raises:
        InputError: apt is missing, or could not find or download a package; the message says what to do.
    """
    report = on_progress or silent
    _require_tools()
    with tempfile.TemporaryDirectory(prefix="moe-handbook-") as temporary:
        downloads, root = Path(temporary, "packages"), Path(temporary, "root")
        report(f"downloading {len(PACKAGES)} Debian packages, about 44 MB")
        _download(downloads)
        for package in sorted(downloads.glob("*.deb")):
            report(f"unpacking {package.name}")
            _run(["dpkg-deb", "-x", str(package), str(root)], downloads)
        return extract(root, out_dir, on_progress=report)


def extract(root: Path, out_dir: Path, *, on_progress: Progress | None = None) -> FetchReport:
    """Write the corpus from packages that lie unpacked under `root`; see `fetch_handbook`.

    A page is a document, and in the same split as its translation. A line that occurs twice in a language is
    kept once, and no run of 13 words of a held-out page occurs in a training page (see `moe.data.split`).

    Raises:
        InputError: There is no page of a language, or a licence is missing.
    """
    report = on_progress or silent
    licences = tuple(_copy_licence(root, package, out_dir) for package in PACKAGES)
    texts = []
    for language in _LANGUAGES:
        report(f"extracting {language.code}")
        pages = list(_pages(root, language))
        train = [page for page in pages if not is_heldout(_neutral_name(page.name))]
        heldout = drop_overlap((page for page in pages if is_heldout(_neutral_name(page.name))), train)
        if not train or not heldout:
            raise InputError(f"no {language.code} pages under {root}; the packages have another layout")
        texts.append(_write(out_dir / f"{language.code}.train.jsonl", train))
        texts.append(_write(out_dir / f"{language.code}.heldout.jsonl", heldout))
    return FetchReport(tuple(texts), licences)


def _require_tools() -> None:
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} not found: this corpus comes from Debian packages. Run the command on "
            "Debian or Ubuntu (a container will do) and copy its output, or prepare your own text with "
            "`moe data prepare`"
        )


def _download(folder: Path) -> None:
    folder.mkdir()
    try:
        _run(["apt-get", "download", "--quiet", *PACKAGES], folder)
    except InputError as error:
        raise InputError(
            f"{error}. Check the network, and if the package lists are old run `apt-get update` as root"
        ) from error


def _run(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        complaint = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]
        raise InputError(f"`{' '.join(command)}` failed with exit code {result.returncode}: {complaint}")


def _pages(root: Path, language: _Language) -> Iterator[Document]:
    seen: set[str] = set()
    for path in sorted(path for pattern in language.patterns for path in root.glob(pattern)):
        lines = []
        for line in visible_lines(path.read_text(encoding="utf-8")):
            if language.is_prose(line) and line not in seen:
                seen.add(line)
                lines.append(line)
        if lines:
            yield Document(path.relative_to(root).as_posix(), "\n".join(lines) + "\n")


def _neutral_name(name: str) -> str:
    """Name of a page without its language, the same for a page and its translation."""
    return _LANGUAGE_IN_PATH.sub("*", name)


def _write(path: Path, documents: list[Document]) -> WrittenText:
    text_bytes = 0
    with atomic_writer(path) as file:
        for document in documents:
            record = {"name": document.name, "text": document.text}
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            text_bytes += len(document.text.encode())
    return WrittenText(path, len(documents), text_bytes)


def _copy_licence(root: Path, package: str, out_dir: Path) -> Path:
    source = root / "usr/share/doc" / package / "copyright"
    if not source.is_file():
        raise InputError(f"package {package} has no licence at {source}; its text cannot be used without")
    target = out_dir / "licences" / f"{package}.txt"
    with atomic_writer(target) as file:
        file.write(source.read_bytes())
    return target
