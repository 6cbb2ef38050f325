"""From a YAML file and dotted overrides to a RunConfig, with every problem reported at once.

A problem names the place (file and line, or the override), the key and its value, and the remedy.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from moe.config.rules import Rule, violations
from moe.config.schema import RunConfig
from moe.config.tree import FLOAT_TAG, FLOAT_WITHOUT_POINT, ConfigTree
from moe.errors import InputError

_LONGEST_SHOWN_VALUE = 60  # characters

Loaded = TypeVar("Loaded", bound=RunConfig)


class ConfigError(InputError):
    """One or more things that are wrong with a config; `problems` holds one sentence for each."""

    on_all_ranks = True  # under torchrun every rank reads the same file

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{count} in the config, nothing was started:", *problems]))


class _Dumper(yaml.SafeDumper):
    """Quotes text that looks like a number to our loader, beside what looks so to any YAML reader."""


_Dumper.add_implicit_resolver(FLOAT_TAG, FLOAT_WITHOUT_POINT, list("-+0123456789"))


def load_config(path: Path, overrides: Sequence[str] = (), *, world_size: int | None = 1) -> RunConfig:
    """Read, override, validate.

    Args:
        path: A YAML recipe.
        overrides: `dotted.key=value`, the value in YAML syntax.
        world_size: Number of ranks, for the rules about layouts and batches; None leaves those out.

    Raises:
        ConfigError: Something in it is wrong; the text names every problem.
        InputError: The file cannot be read or is not YAML.
    """
    return load_as(RunConfig, path, overrides, world_size=world_size)


def load_as(
    schema: type[Loaded],
    path: Path,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = 1,
    rules: Sequence[Rule] | None = None,
) -> Loaded:
    """Like load_config, for a schema that adds sections to a run's, or with other rules than all."""
    tree = ConfigTree(path)
    for override in overrides:
        tree.override(override)
    config, problems = _validate(tree, schema, world_size, rules)
    problems = [*tree.problems, *problems]
    if problems or config is None:
        raise ConfigError(problems)
    return config


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back equal."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _validate(
    tree: ConfigTree, schema: type[Loaded], world_size: int | None, rules: Sequence[Rule] | None
) -> tuple[Loaded | None, list[str]]:
    """The config, or None and what is wrong with single keys and with keys that rules join."""
    config, problems, bad_keys = None, [], []
    try:
        # JSON mode is strict ("16" is no integer) and still turns text into paths and lists into tuples.
        config = schema.model_validate_json(json.dumps(tree.values), strict=True)
    except ValidationError as error:
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            bad_keys.append(key)
            problems.append(f"{tree.nearest_place(key)}: {_describe(key, item, schema)}")
    # Rules that read only sound keys speak at once, so that one attempt shows everything.
    unread = "" in bad_keys  # the whole is at fault, so no key is known to be sound
    leaves = {} if unread else dict(_sound_leaves(tree.values, bad_keys, schema))
    for violation in violations(leaves, world_size, rules):
        written = next((key for key in violation.keys if tree.place(key)), "")
        problems.append(f"{tree.nearest_place(written)}: {violation.message}")
    return config, problems


def _describe(key: str, item: Mapping[str, Any], schema: type[RunConfig]) -> str:
    """One problem that pydantic found, in our words where those help more."""
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}{_suggest(item['loc'], schema)}"
    if item["type"] == "missing":
        return f"{key} is missing; add it"
    if item["type"] == "model_type":
        return f"{key}={_shown(item['input'])} must be a section: keys, each with a value"
    message = item["msg"][:1].lower() + item["msg"][1:]
    return f"{key}={_shown(item['input'])}: {message}" if key else message


def _shown(value: object) -> str:
    """A value as YAML would write it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_SHOWN_VALUE else f"{text[:_LONGEST_SHOWN_VALUE]}..."


def _suggest(loc: Sequence[str | int], schema: type[RunConfig]) -> str:
    """The nearest valid key: the same name elsewhere, one alike in the section, or one alike anywhere."""
    *parents, leaf = (str(part) for part in loc if isinstance(part, str))  # an item of a list has no name
    if "." in leaf:
        return "; in a file, sections are nested, dots are for overrides"
    section = ".".join(parents)
    every = list(_known_keys(schema))
    siblings = [key for key in every if key.rpartition(".")[0] == section]
    same = [key for key in every if _name(key) == leaf]
    near = same or _alike(leaf, siblings, least=0.5) or _alike(leaf, every, least=0.6)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; {section or 'a config'} takes {', '.join(map(_name, siblings))}"


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _alike(leaf: str, keys: Sequence[str], *, least: float) -> list[str]:
    """The keys whose name is spelled most like the leaf; none if all are less alike than `least`, of 1."""
    names = difflib.get_close_matches(leaf, [_name(key) for key in keys], n=1, cutoff=least)
    return [key for key in keys if _name(key) in names]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, alone or in a list; None for a plain value."""
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that a config may hold, items of lists without their number."""
    for name, field in model.model_fields.items():
        yield prefix + name
        section = _section_of(field.annotation)
        if section is not None:
            yield from _known_keys(section, f"{prefix}{name}.")


def _sound_leaves(
    tree: Mapping[str, Any], bad_keys: Sequence[str], model: type[BaseModel], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf that is valid, defaults filled in; a list is one leaf."""
    for name, field in model.model_fields.items():
        key = prefix + name
        section = None if get_origin(field.annotation) is tuple else _section_of(field.annotation)
        if key in bad_keys or (section is None and any(bad.startswith(f"{key}.") for bad in bad_keys)):
            continue
        if section is not None:
            yield from _sound_leaves(tree.get(name, {}), bad_keys, section, f"{key}.")
        elif name in tree:
            yield key, tree[name]
        elif not field.is_required():
            yield key, field.get_default()
