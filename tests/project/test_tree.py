"""The tree itself: sizes, names, the kernels' link, recipes, and the settings of lint and typing."""

from __future__ import annotations

import fnmatch
import math
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from moe.config import load_config

ROOT = Path(__file__).parents[2]
MAX_LINES = 400
RECIPES = sorted(path for path in (ROOT / "configs").rglob("*.y*ml") if path.parent.name != "sites")

# Assembled, so that this file passes its own test.
REGISTRIES = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("anaconda", "org"),
        ("npmjs", "org"),
        ("crates", "io"),
        ("proxy", "golang", "org"),
        ("rubygems", "org"),
        ("docker", "io"),
        ("ghcr", "io"),
        ("deb", "debian", "org"),
        ("archive", "ubuntu", "com"),
    )
]


def _project_files() -> Iterator[Path]:
    """Every file that git does not ignore; links are not followed."""
    ignored = [".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text().split())]
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not any(fnmatch.fnmatch(name, glob) for glob in ignored)]
        yield from (Path(folder, name) for name in files)


FILES = sorted(_project_files())


def test_walk_finds_the_project():
    names = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert {"Makefile", "pyproject.toml", ".ci/run", "moe/cli.py", "kernels/combine/op.py"} <= names
    assert not [name for name in names if name.startswith((".venv", ".git/"))]


def test_no_file_is_longer_than_a_reader_can_hold():
    code = [path for path in FILES if path.suffix in (".py", ".sh") or path.name == "Makefile"]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in code}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_file_is_named_for_what_has_no_name():
    vague = {"utils", "util", "helpers", "misc", "common"}
    assert [path for path in FILES if path.suffix == ".py" and path.stem in vague] == []


def test_kernels_are_reached_through_the_link_only():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "moe" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert (link / "combine" / "op.py").samefile(ROOT / "kernels" / "combine" / "op.py")


def test_tests_are_no_packages_and_their_names_are_unique():
    tests = [path for path in FILES if ROOT / "tests" in path.parents]
    assert [path for path in tests if path.name == "__init__.py"] == []
    names = [path.name for path in tests if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


def test_no_file_names_a_package_registry():
    pattern = re.compile("|".join(map(re.escape, REGISTRIES)), re.IGNORECASE)
    texts = ((path, path.read_bytes().decode(errors="replace")) for path in FILES if not path.is_symlink())
    assert [str(path) for path, text in texts if pattern.search(text)] == []
    assert pattern.search("https://files." + REGISTRIES[1] + "/packages")


def test_every_exception_to_lint_or_typing_says_which():
    blanket = re.compile(r"#\s*(type:\s*ignore(?!\[)|noqa(?!:))")
    found = [
        f"{path}:{number}"
        for path in FILES
        if path.suffix == ".py" and path.parent != Path(__file__).parent
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if blanket.search(line)
    ]
    assert found == []
    assert blanket.search("x = 1  # noqa")
    assert not blanket.search("x = 1  # type: ignore[misc]  # noqa: E501")


def test_lint_and_typing_cover_what_the_other_tests_leave_to_them():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["mypy"]["strict"] is True
    assert tools["mypy"]["packages"] == ["moe"]  # and kernels/, through the link
    assert {"D", "S", "TID", "B", "PL", "T20"} <= set(tools["ruff"]["lint"]["select"])
    assert "kernels" in tools["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    relaxed = tools["ruff"]["lint"]["per-file-ignores"]
    assert not [
        glob for glob in relaxed if glob.startswith(("moe", "kernels")) and {"D", "S"} & {*relaxed[glob]}
    ]


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_on_the_fewest_ranks_it_can_have(recipe):
    layout = {"tp": 1, "pp": 1, "ep": 1, "cp": 1} | (yaml.safe_load(recipe.read_text()).get("parallel") or {})
    stage = math.lcm(layout["tp"] * layout["cp"], layout["ep"])
    assert load_config(recipe, world_size=stage * layout["pp"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_begins_with_its_source(recipe):
    lines = recipe.read_text().splitlines()
    comment = " ".join(line for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])
    source = re.compile(r"arXiv \d{4}\.\d{5}|https://|ours")
    assert source.search(comment), "say in the first lines where the sizes come from"
