"""What no file of the library may do: run foreign code from data, a shell, or hide what went wrong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("moe", "kernels", "scripts", "benchmarks")

FORBIDDEN = {
    **dict.fromkeys(
        ["pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle", "_pickle"], "runs foreign code"
    ),
    **dict.fromkeys(["dill", "cloudpickle", "joblib", "shelve", "marshal"], "runs foreign code"),
    **dict.fromkeys(["pandas.read_pickle", "torch.hub.load"], "runs foreign code"),
    **dict.fromkeys(["eval", "exec", "builtins.eval", "builtins.exec"], "runs text as code"),
    **dict.fromkeys(["os.system", "os.popen", "pty.spawn"], "starts a shell"),
    **dict.fromkeys(["subprocess.getoutput", "subprocess.getstatusoutput"], "starts a shell"),
    "asyncio.create_subprocess_shell": "starts a shell",
    **dict.fromkeys(["yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.UnsafeLoader"], "builds any object"),
    **dict.fromkeys(["yaml.full_load", "yaml.full_load_all", "yaml.FullLoader"], "builds objects"),
    **dict.fromkeys(
        ["yaml.Loader", "yaml.CLoader", "yaml.CUnsafeLoader", "yaml.CFullLoader"], "builds objects"
    ),
}
# The gate in front of torch's own pickle: its Unpickler resolves every global to a stand-in.
ALLOWED = {("moe/checkpoint/pickle_gate.py", "pickle.Unpickler")}

SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader", "yaml.BaseLoader"}
# Calls that need a keyword to be safe, and its only good value.
NEEDED = {"torch.load": ("weights_only", True)}
# Keywords that are unsafe unless they are absent or this constant.
RISKY = {"shell": False, "trust_remote_code": False, "allow_pickle": False}


class _Gate(ast.NodeVisitor):
    """Collects what one file may not do."""

    def __init__(self, path: str, tree: ast.Module) -> None:
        self.path = path
        self.found: list[str] = []
        self.full_names = dict(_full_names(tree))  # local name -> what it was imported as
        self.safe_loaders = SAFE_LOADERS | {
            node.name
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.bases and {*map(self.name, node.bases)} <= SAFE_LOADERS
        }
        self.visit(tree)

    def name(self, node: ast.AST) -> str:
        """Dotted name of an expression as if everything were imported by `import`; empty if it has none."""
        if isinstance(node, ast.Name):
            return self.full_names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{owner}.{node.attr}" if (owner := self.name(node.value)) else ""
        return ""

    def report(self, node: ast.AST, text: str) -> None:
        self.found.append(f"{self.path}:{getattr(node, 'lineno', 0)}: {text}")

    def visit_Name(self, node: ast.Name) -> None:
        self.refuse_forbidden(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.refuse_forbidden(node)
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.refuse_name(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self.refuse_name(node, f"{node.module}.{alias.name}")

    def refuse_forbidden(self, node: ast.Name | ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.refuse_name(node, self.name(node))

    def refuse_name(self, node: ast.AST, name: str) -> None:
        for forbidden, why in FORBIDDEN.items():
            if f"{name}.".startswith(f"{forbidden}.") and (self.path, forbidden) not in ALLOWED:
                self.report(node, f"{name} {why}")

    def visit_Call(self, node: ast.Call) -> None:
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        name = self.name(node.func)
        if name in NEEDED:
            keyword, value = NEEDED[name]
            if not _is_constant(keywords.get(keyword), value):
                self.report(node, f"{name} needs {keyword}={value}")
        for keyword, value in RISKY.items():
            if keyword in keywords and not _is_constant(keywords[keyword], value):
                self.report(node, f"{keyword}={ast.unparse(keywords[keyword])}")
        if name in ("yaml.load", "yaml.load_all"):
            loader = keywords.get("Loader") or (node.args[1] if len(node.args) > 1 else None)
            if loader is None or self.name(loader) not in self.safe_loaders:
                self.report(node, f"{name} with a loader that is no SafeLoader")
        self.generic_visit(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.type is None:
            self.report(node, "bare except hides what went wrong")
        self.generic_visit(node)

    def visit_Global(self, node: ast.Global) -> None:
        self.report(node, "global state")


def _full_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def gate(path: str, source: str) -> list[str]:
    """What a file does that none may do, as path:line and reason."""
    return _Gate(path, ast.parse(source)).found


FILES = sorted(path.relative_to(ROOT).as_posix() for top in FOLDERS for path in (ROOT / top).rglob("*.py"))


def test_walk_finds_the_code():
    assert {"moe/cli.py", "moe/config/load.py", "kernels/combine/op.py"} <= set(FILES)


@pytest.mark.parametrize("path", FILES)
def test_file_passes_the_gate(path):
    assert gate(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(("path", "name"), ALLOWED)
def test_exception_is_still_needed(path, name):
    module, _, attribute = name.rpartition(".")
    assert f"({module}.{attribute})" in (ROOT / path).read_text(), "remove the exception from ALLOWED"


PLANTED = [
    "import pickle\npickle.load(f)",
    "import pickle as p\np.loads(b)",
    "from pickle import loads",
    "import pickle\nclass U(pickle.Unpickler): ...",
    "import pickle\nread = pickle.loads",
    "import dill",
    "def f():\n    from joblib import load",
    "import torch\ntorch.load(f)",
    "import torch\ntorch.load(f, weights_only=False)",
    "import torch\ntorch.load(f, weights_only=flag)",
    "from torch import load\nload(f)",
    "import numpy as np\nnp.load(f, allow_pickle=True)",
    "import yaml\nyaml.load(f)",
    "import yaml\nyaml.load(f, Loader=Other)",
    "import yaml\nyaml.load(f, Loader=yaml.Loader)",
    "import yaml\nyaml.load_all(f, make())",
    "from yaml import unsafe_load",
    "import yaml\nclass L(yaml.FullLoader): ...",
    "import yaml\nclass L(yaml.SafeLoader, Mixin): ...\nyaml.load(f, L)",
    "eval(text)",
    "run = exec",
    "import os\nos.system('ls')",
    "from os import popen",
    "import subprocess\nsubprocess.run('ls', shell=True)",
    "import subprocess\nsubprocess.run('ls', shell=flag)",
    "load(name, trust_remote_code=True)",
    "try:\n    f()\nexcept:\n    pass",
    "def f():\n    global g",
]


@pytest.mark.parametrize("source", PLANTED)
def test_planted_offence_is_caught(source):
    assert gate("moe/planted.py", source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import yaml\nyaml.safe_load(f)\nyaml.load(f, Loader=yaml.SafeLoader)",
        "import yaml\nclass L(yaml.SafeLoader): ...\nyaml.load(f, Loader=L)",
        "model.eval()\nimport subprocess\nsubprocess.run(['ls'], shell=False)",
        "import pickle\npickle.dumps(x)\npickle.UnpicklingError",
        "try:\n    f()\nexcept ValueError:\n    pass",
    ],
)
def test_what_only_looks_alike_passes(source):
    assert gate("moe/planted.py", source) == []
