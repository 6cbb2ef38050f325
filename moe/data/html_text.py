"""The prose of an HTML page, line by line."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_HIDDEN_TAGS = frozenset({"script", "style", "head", "nav", "header", "footer", "pre", "noscript"})
# Tags inside a sentence; every other tag begins a new line.
_INLINE_TAGS = frozenset({
    "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "cite", "code", "dfn", "em", "font", "i", "kbd", "mark",
    "q", "rp", "rt", "ruby", "s", "samp", "small", "span", "strong", "sub", "sup", "tt", "u", "var", "wbr",
})  # fmt: skip
_JAPANESE = re.compile(r"[\u3041-\u30ff\u3400-\u9fff々]")
# Shortest lines that are prose and not a heading, a menu or a cell of a table; chosen on the packages of
# `moe data fetch handbook`.
_MIN_JA_CHARACTERS = 15
_MIN_JA_SHARE = 0.4
_MIN_EN_CHARACTERS = 40
_MIN_EN_WORDS = 6


def visible_lines(html: str) -> list[str]:
    """Lines of text that a reader sees, without markup, scripts, menus and preformatted listings."""
    page = _Page()
    page.feed(html)
    page.close()
    lines = "".join(page.parts).split("\n")
    return [line for line in (" ".join(line.split()) for line in lines) if line]


def is_japanese_prose(line: str) -> bool:
    """Say whether a line is long enough, and Japanese enough, to be a Japanese sentence."""
    share = len(_JAPANESE.findall(line)) / max(len(line), 1)
    return len(line) >= _MIN_JA_CHARACTERS and share >= _MIN_JA_SHARE


def is_english_prose(line: str) -> bool:
    """Say whether a line is long enough, in characters and words, to be an English sentence."""
    return len(line) >= _MIN_EN_CHARACTERS and len(line.split()) >= _MIN_EN_WORDS


class _Page(HTMLParser):
    """Collects text; a newline stands for every tag that is not inside a sentence."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN_TAGS:
            self._hidden += 1
        if tag not in _INLINE_TAGS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _HIDDEN_TAGS:
            self._hidden = max(self._hidden - 1, 0)
        if tag not in _INLINE_TAGS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data.replace("\n", " "))
