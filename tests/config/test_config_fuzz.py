"""Whatever is written into a config, the answer is a config or a sentence, at once."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from types import GenericAlias
from typing import get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from moe.config import ConfigError, RunConfig, load_config
from moe.config.schema import BlendPart
from moe.errors import InputError

VALUES = [
    *[
        "0",
        "-1",
        "1",
        "2",
        "7",
        "3.5",
        "-0.0",
        "1e-4",
        "1e308",
        "1e999",
        ".nan",
        "-.inf",
        "9" * 40,
        "9" * 400,
    ],
    *["true", "null", "", "~", '""', "text", '"16"', "${oc.env:HOME}", "日本", '"\\ud800"', "2024-01-01"],
    *["[]", "[1]", "[[]]", "[null]", "{}", "{a: 1}", "{1: 2}", "{null: 1}", "{0: {prefix: a}}", "[{}]"],
    *["[{prefix: a}]", "[{prefix: a, weight: 0}]", "[" * 60 + "]" * 60, "!!set {a}", "&a 1", "*a", "a: b: c"],
]


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        annotation = (
            get_args(field.annotation)[0] if get_origin(field.annotation) is tuple else field.annotation
        )
        yield prefix + name
        if isinstance(annotation, type) and not isinstance(annotation, GenericAlias):
            if issubclass(annotation, BlendPart):
                yield from (f"{prefix}{name}.0", f"{prefix}{name}.0.weight")
            elif issubclass(annotation, BaseModel):
                yield from _keys(annotation, f"{prefix}{name}.")


KEYS = [*_keys(RunConfig), "nothing", "model.nothing", "model.top_k.deeper", "data.train.0.prefix.0"]


def _answer(path, overrides, world_size):
    started_s = time.process_time()
    try:
        load_config(path, overrides, world_size=world_size)
    except InputError as error:
        assert str(error).strip()
        if isinstance(error, ConfigError):
            assert all(problem.strip() for problem in error.problems)
    assert time.process_time() - started_s < 1.0, overrides


@pytest.mark.parametrize("value", VALUES)
def test_any_value_is_answered_at_a_third_of_the_keys(sound, value):
    for key in KEYS[VALUES.index(value) % 3 :: 3]:
        _answer(sound, [f"{key}={value}"], 4)


def test_random_combinations_are_answered(sound):
    random_source = random.Random(1)
    for _ in range(200):
        count = random_source.randint(2, 6)
        overrides = [f"{random_source.choice(KEYS)}={random_source.choice(VALUES)}" for _ in range(count)]
        _answer(sound, overrides, random_source.choice([None, 1, 2, 3, 8, 10**9]))


def test_damaged_files_are_answered(sound, sound_text):
    random_source = random.Random(2)
    text = sound_text.encode()
    for _ in range(200):
        at, length = random_source.randrange(len(text)), random_source.randint(0, 4)
        junk = bytes(random_source.choice(b"\x00\xff\t\n :-[]{}&*!|>'\"%@#,?e9") for _ in range(length))
        sound.write_bytes(text[:at] + junk + text[at + random_source.randint(0, 30) :])
        _answer(sound, [], 1)


def test_sections_of_the_wrong_shape_are_answered(sound, sound_text):
    whole = yaml.safe_load(sound_text)
    for section in RunConfig.model_fields:
        for shape in (None, [], [1], 1, "text", True, {"": 1}):
            sound.write_text(yaml.safe_dump({**whole, section: shape}))
            _answer(sound, [f"{section}.x=1"], 1)
