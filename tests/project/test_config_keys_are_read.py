"""Every key of a config is read by code: a key that nobody reads would be a promise that nobody keeps.

Follows the types of names through each function: parameters annotated with a section, attributes of a section
that hold another, plain and tuple assignments, loops over a list of sections.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_origin

import pytest
from pydantic import BaseModel

from moe.config import schema

MOE = Path(__file__).parents[2] / "moe"
SECTIONS = {
    name: value
    for name, value in vars(schema).items()
    if isinstance(value, type) and issubclass(value, schema.Section) and value is not schema.Section
}
Types = dict[str, str]  # name (or "self.name") -> name of its section
Field = tuple[str, str]  # section, key


def _field_type(section: str, name: str) -> str | None:
    """The section that a field holds, alone or in a list."""
    field = SECTIONS[section].model_fields.get(name)
    if field is None:
        return None
    held = get_args(field.annotation)[0] if get_origin(field.annotation) is tuple else field.annotation
    return held.__name__ if isinstance(held, type) and issubclass(held, BaseModel) else None


def _leaves() -> Iterator[Field]:
    for section, model in SECTIONS.items():
        yield from ((section, name) for name in model.model_fields if _field_type(section, name) is None)


def _properties() -> dict[Field, set[Field]]:
    """The keys that each property of a section reads."""
    tree = ast.parse((MOE / "config" / "schema.py").read_text())
    return {
        (section.name, function.name): {
            (section.name, node.attr)
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }
        for section in tree.body
        if isinstance(section, ast.ClassDef)
        for function in section.body
        if isinstance(function, ast.FunctionDef)
    }


PROPERTIES = _properties()


def _annotated(annotation: ast.expr | None) -> str | None:
    """The one section that an annotation mentions."""
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} if annotation else set()
    return next(iter(names & SECTIONS.keys()), None)


def _type(node: ast.expr, types: Types) -> str | None:
    if isinstance(node, ast.Name):
        return types.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    if isinstance(node.value, ast.Name) and node.value.id == "self":
        return types.get(f"self.{node.attr}")
    owner = _type(node.value, types)
    return _field_type(owner, node.attr) if owner else None


def _bindings(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(target, value) of what a node assigns; a loop assigns items of its list, whose type is named alike."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts, strict=True)
            else:
                yield target, node.value
    elif isinstance(node, ast.For | ast.comprehension):
        yield node.target, node.iter


def _bind(root: ast.AST, types: Types) -> Types:
    found = dict(types)
    for node in ast.walk(root):
        for target, value in _bindings(node):
            held = _type(value, found)
            if held and isinstance(target, ast.Name | ast.Attribute):
                found[ast.unparse(target)] = held
    return found


def _parameters(function: ast.FunctionDef) -> Types:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return {argument.arg: held for argument in arguments if (held := _annotated(argument.annotation))}


def fields_read(source: str) -> set[Field]:
    """The (section, key) pairs that a module reads."""
    tree = ast.parse(source)
    attributes: Types = {}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        bound = _bind(function, _parameters(function))
        attributes |= {name: held for name, held in bound.items() if name.startswith("self.")}
    read: set[Field] = set()
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        types = _bind(function, attributes | _parameters(function))
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = _type(node.value, types)
                if owner:
                    read |= PROPERTIES.get((owner, node.attr), {(owner, node.attr)})
    return read


@pytest.fixture(scope="module")
def read_anywhere() -> set[Field]:
    sources = [path for path in MOE.rglob("*.py") if path.parent.name != "config"]
    return set().union(*(fields_read(path.read_text()) for path in sources))


@pytest.mark.parametrize("field", _leaves(), ids=".".join)
def test_key_is_read(read_anywhere, field):
    assert field in read_anywhere, f"no code outside moe/config reads {'.'.join(field)}: use it or remove it"


PLANTED = SimpleNamespace(
    reads="""
class Loop:
    def __init__(self, config: RunConfig, parts: tuple[BlendPart, ...]):
        self.config = config
        train, attention = config.train, config.model.attention
        self.steps = train.steps + attention.query_groups
        self.prefixes = [part.prefix for part in parts]

    def go(self):
        return self.config.optim.lr
""",
    reads_nothing="""
def go(config: RunConfig, engine: Engine, optim):
    config.optim.eps = 1
    engine.device, optim.beta1, "config.optim.beta2"
    return config.optim
""",
)


def test_reader_follows_names_and_nothing_else():
    assert fields_read(PLANTED.reads) >= {
        ("TrainSection", "steps"),
        ("AttentionSection", "num_query_groups"),
        ("AttentionSection", "num_heads"),
        ("BlendPart", "prefix"),
        ("OptimSection", "lr"),
    }
    assert fields_read(PLANTED.reads_nothing) == {("RunConfig", "optim")}
