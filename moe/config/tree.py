"""A YAML file and dotted overrides as one plain tree, with the place where each key was written.

The YAML is what JSON can say, in YAML's dress. What makes YAML 1.1 surprising or unsafe is not part of it:
tags that make objects, aliases, and text taken for something else (`off` for false, `12:30` for 750).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from moe.config.schema import RunConfig
from moe.errors import InputError

_OVERRIDE_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
# A number that Python refuses to read is a ValueError, nesting without end a RecursionError.
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)

FLOAT_TAG = "tag:yaml.org,2002:float"
FLOAT_WITHOUT_POINT = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")  # 1e-4, text in YAML 1.1


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2's idea of which plain scalars are not text."""

    # The class attributes of SafeLoader hold YAML 1.1's rules for all its users; these are our own.
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's way to configure a class
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in {"null", "bool", "int", "float", "str", "seq", "map"}
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse aliases: they can make a value contain itself, or a short file a huge one."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not read; write the value out", problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    ("float", FLOAT_WITHOUT_POINT.pattern, list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


class ConfigTree:
    """The values of a config as they were written.

    Attributes:
        values: The nested mappings and lists.
        problems: What could not be read, one sentence each.
    """

    def __init__(self, path: Path) -> None:
        """Read a file.

        Raises:
            InputError: The file cannot be read, is not YAML, or is not a mapping.
        """
        try:
            node, values = _parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such config file; see configs/ for recipes") from error
        except (OSError, *_NOT_YAML) as error:
            raise InputError(f"{path}{_line(error)}: cannot be read as YAML: {_reason(error)}") from error
        if not isinstance(values, dict) or node is None:
            sections = ", ".join(RunConfig.model_fields)
            raise InputError(f"{path}: a config is a mapping of the sections {sections}")
        self.values: dict[str, Any] = values
        self.problems: list[str] = []
        self._source = str(path)
        self._places: dict[str, str] = {}
        self._record(((key, f"{path}:{line}") for key, line in _key_lines(node, "")))

    def override(self, text: str) -> None:
        """Set what `dotted.key=value` says, the value in YAML; a list item is `list.0`.

        An override that cannot be read or set is added to `problems`.
        """
        place = f"override {text!r}"
        key, equals, value_text = text.partition("=")
        if not equals or not _OVERRIDE_KEY.fullmatch(key):
            self.problems.append(f"{place}: write key=value, for example optim.lr=3e-4")
            return
        try:
            node, value = _parse(value_text)
        except _NOT_YAML as error:
            self.problems.append(f"{place}: the value is not YAML: {_reason(error)}")
            return
        why_not = _set(self.values, key.split("."), value)
        if why_not:
            self.problems.append(f"{place}: {why_not}")
            return
        self._places = {k: at for k, at in self._places.items() if not f"{k}.".startswith(f"{key}.")}
        for parent in _parents(key):
            self._places.setdefault(parent, place)
        self._places[key] = place
        self._record((inner, place) for inner, _ in _key_lines(node, f"{key}."))

    def place(self, key: str) -> str | None:
        """Where the key was written, as file:line or the override; None if it was not."""
        return self._places.get(key)

    def nearest_place(self, key: str) -> str:
        """Where the key or, if it was not written, the section around it was."""
        return next((self._places[k] for k in (key, *_parents(key)) if k in self._places), self._source)

    def _record(self, places: Iterator[tuple[str, str]]) -> None:
        """Note the places of keys that should be new."""
        for key, place in places:
            if key in self._places:
                self.problems.append(
                    f"{place}: {key} stands twice (first at {self._places[key]}); remove one"
                )
            self._places[key] = place


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    """The YAML nodes, which know their lines, and the values. Raises one of _NOT_YAML."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _key_lines(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    """Every dotted key below a node and its line, from 1, in the order of the text."""
    if isinstance(node, yaml.MappingNode):
        below = [(key_node.value, key_node, value_node) for key_node, value_node in node.value]
    elif isinstance(node, yaml.SequenceNode):
        below = [(index, item, item) for index, item in enumerate(node.value)]
    else:
        below = []
    for name, named, inner in below:
        yield f"{prefix}{name}", named.start_mark.line + 1
        yield from _key_lines(inner, f"{prefix}{name}.")


def _parents(key: str) -> Iterator[str]:
    """The dotted keys of the sections around a key, innermost first."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _set(values: dict[str, Any], parts: list[str], value: object) -> str | None:
    """Write a value, making sections that are absent; returns why that is impossible, or None."""
    at: Any = values
    for depth, part in enumerate(parts, start=1):
        here = ".".join(parts[: depth - 1])
        index: Any = part
        if isinstance(at, list):
            items = {str(position): position for position in range(len(at))}
            if part not in items:
                return f"{here} has the items {', '.join(items) or '(none)'}, not {part}"
            index = items[part]
        elif not isinstance(at, dict):
            return f"{here} is a value, not a section, so {part} cannot be set in it"
        if depth == len(parts):
            at[index] = value
        else:
            at = at.setdefault(index, {}) if isinstance(at, dict) else at[index]
    return None


def _line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f":{mark.line + 1}"


def _reason(error: Exception) -> str:
    """What was wrong, without the lines of context that PyYAML adds."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError):
        return ", ".join(part for part in (error.context, error.problem) if part)
    return str(error)
