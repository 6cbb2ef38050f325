"""From a YAML file and dotted overrides to a RunConfig, with every problem reported at once.

A problem names the key, where it stands (file and line, or the override), and the remedy.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from moe.config.rules import violations
from moe.config.schema import RunConfig
from moe.errors import InputError

Tree = dict[str, Any]
Places = dict[str, str]  # dotted key -> "file:line" or "override"


class ConfigError(InputError):
    """One or more things that are wrong with a config; `problems` holds one sentence for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{count} in the config, nothing was started:", *problems]))


class _Loader(yaml.SafeLoader):
    """The safe loader, except that 1e-4 is a float (YAML 1.1 reads it as a string) and keys are unique."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(path: Path, overrides: Sequence[str] = (), *, world_size: int | None = 1) -> RunConfig:
    """Read, override, validate.

    Args:
        path: a YAML recipe.
        overrides: `dotted.key=value`, the value in YAML syntax.
        world_size: number of ranks, for the rules about layouts and batches; None leaves those out.

    Raises:
        ConfigError: naming every problem at once.
        InputError: if the file cannot be read or is not YAML.
    """
    tree, places = read_yaml(path)
    problems = apply_overrides(tree, places, overrides)
    config, found = validate(tree, places, str(path), world_size)
    problems += found
    if problems or config is None:
        raise ConfigError(problems)
    return config


def read_yaml(path: Path) -> tuple[Tree, Places]:
    """The file's mapping and the line of every key. Raises InputError or ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such config file; see configs/ for recipes") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict) or not isinstance(node, yaml.MappingNode):
        raise InputError(f"{path}: a config is a mapping with the sections {', '.join(RunConfig.model_fields)}")
    places: Places = {}
    repeated: list[str] = []
    for key, line in _key_lines(node, ""):
        if key in places:
            repeated.append(f"{path}:{line}: {key} stands twice (first at {places[key]}); remove one")
        places[key] = f"{path}:{line}"
    if repeated:
        raise ConfigError(repeated)
    return tree, places


def _key_lines(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            yield key, key_node.start_mark.line + 1
            yield from _key_lines(value_node, f"{key}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield f"{prefix}{index}", item.start_mark.line + 1
            yield from _key_lines(item, f"{prefix}{index}.")


def apply_overrides(tree: Tree, places: Places, overrides: Sequence[str]) -> list[str]:
    """Write each override into the tree; returns a problem for each that cannot be read."""
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w]*(\.\w+)*", key):
            problems.append(f"override {override!r}: write key=value, for example optim.lr=3e-4")
            continue
        try:
            value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass
        except yaml.YAMLError as error:
            problems.append(f"override {override!r}: the value is not YAML: {error}")
            continue
        problem = _set(tree, key, value, override)
        if problem is None:
            places[key] = f"override {override!r}"
        else:
            problems.append(problem)
    return problems


def _set(tree: Tree, key: str, value: object, override: str) -> str | None:
    *parents, leaf = key.split(".")
    at: Any = tree
    for parent in parents:
        if isinstance(at, list) and parent.isdigit() and int(parent) < len(at):
            at = at[int(parent)]
        elif isinstance(at, dict):
            at = at.setdefault(parent, {})
        else:
            return f"override {override!r}: {parent} cannot be entered; it is not a section or a list item"
    if not isinstance(at, dict):
        return f"override {override!r}: {'.'.join(parents)} is a value, not a section, so {leaf} cannot be set in it"
    at[leaf] = value
    return None


@dataclass(frozen=True)
class _Bad:
    """A key that did not validate."""

    key: str
    message: str


def validate(tree: Tree, places: Places, source: str, world_size: int | None) -> tuple[RunConfig | None, list[str]]:
    """Validate a tree; returns the config, or None and the problems, worst place first named."""
    config, bad = None, []
    try:
        # JSON mode is strict ("16" is no integer) and still turns text into paths and lists into tuples.
        config = RunConfig.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        bad = [_describe(dict(item)) for item in error.errors()]
    problems = [f"{_place(places, b.key, source)}: {b.message}" for b in bad]
    values = _leaves(RunConfig, tree, {b.key for b in bad})
    for violation in violations(values, world_size):
        place = next((places[k] for k in violation.keys if k in places), source)
        problems.append(f"{place}: {violation.message}")
    return (None if problems else config), problems


def _place(places: Places, key: str, source: str) -> str:
    """Where the key, or else the nearest section above it, stands."""
    while key:
        if key in places:
            return places[key]
        key = key.rpartition(".")[0]
    return source


def _describe(item: Mapping[str, Any]) -> _Bad:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return _Bad(key, f"unknown key {key}{_suggest(key)}")
    if item["type"] == "missing":
        return _Bad(key, f"{key} is missing; add it")
    return _Bad(key, f"{key}={item['input']!r}: {_lower(item['msg'])}")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _suggest(key: str) -> str:
    """The nearest valid key in the same section, else anywhere, else the section's keys."""
    section, _, leaf = key.rpartition(".")
    every = list(known_keys(RunConfig))
    siblings = [k for k in every if k.rpartition(".")[0] == section]
    near = difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in siblings], n=1, cutoff=0.5)
    if near:
        return f"; did you mean {section + '.' if section else ''}{near[0]}?"
    elsewhere = [k for k in every if k.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; {section or 'a config'} takes: {', '.join(k.rpartition('.')[2] for k in siblings)}"


def _section_type(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    if get_origin(annotation) is tuple:
        return _section_type(get_args(annotation)[0])
    return None


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that a config may hold."""
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = _section_type(field.annotation)
        if inner is not None:
            yield from known_keys(inner, f"{prefix}{name}.")


def _leaves(model: type[BaseModel], tree: object, bad: set[str], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, defaults filled in, without those that are invalid or absent."""
    values: dict[str, Any] = {}
    given = tree if isinstance(tree, dict) else {}
    for name, field in model.model_fields.items():
        key = prefix + name
        inner = _section_type(field.annotation)
        if inner is not None and get_origin(field.annotation) is not tuple:
            values |= _leaves(inner, given.get(name, {}), bad, f"{key}.")
        elif any(b == key or b.startswith(f"{key}.") or key.startswith(f"{b}.") for b in bad):
            continue
        elif name in given:
            values[key] = given[name]
        elif not field.is_required():
            values[key] = field.get_default()
    return values


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
