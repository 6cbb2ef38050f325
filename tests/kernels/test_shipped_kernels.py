"""Every kernel compiled for H100 and B200 at production sizes: nothing spills, tensor cores are used."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import triton
from compile_gate import assert_fits
from shipped_kernels import Shipped, compile_all, everything
from shipped_request import KERNELS
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "compiled-kernels.json"
pytestmark = pytest.mark.timeout(600)  # the first to run waits for the compiler: a minute or two of two cores
Jit = InterpretedFunction | JITFunction


@pytest.fixture(scope="module")
def shipped() -> list[Shipped]:
    return compile_all()


def test_every_configuration_fits(shipped):
    for each in shipped:
        asked, compiled = each.asked, each.compiled
        assert_fits(compiled, max_registers=asked.max_registers, instructions=asked.instructions)
        if not asked.counts_atomically:
            assert compiled.count("ATOM") == compiled.count("ATOMG") == compiled.count("RED") == 0, (
                compiled.name
            )


def test_the_result_file_is_that_of_these_kernels(shipped):
    written = json.loads(RESULTS.read_text(encoding="utf-8"))
    if written["triton"] != triton.__version__:
        pytest.skip(f"the file is of triton {written['triton']}")
    rows = json.loads(json.dumps([each.row() for each in shipped]))
    assert written["rows"] == rows, (
        f"python tests/shipped_kernels.py --json benchmarks/results/{RESULTS.name}"
    )


def test_every_kernel_of_the_library_is_compiled():
    modules = {path: module_of(path) for path in KERNELS.glob("*/*.py") if "triton.jit" in path.read_text()}
    written = [function for module in modules.values() for function in functions_of(module)]
    asked = {(each.request.path, each.request.function) for each in everything()}
    compiled: set[Jit] = set()
    for path, name in asked:
        compiled |= reached(getattr(modules[path], name))
    missing = [f"{f.fn.__module__}.{f.fn.__name__}" for f in written if f not in compiled]
    assert len(written) > 30 and not missing, f"not in tests/shipped_*.py, nor called by what is: {missing}"


def module_of(path: Path) -> ModuleType:
    return import_module(f"moe.kernels.{path.parent.name}.{path.stem}")


def functions_of(module: ModuleType) -> list[Jit]:
    """The Triton functions that a module defines."""
    found = [value for value in vars(module).values() if isinstance(value, Jit)]
    return [function for function in found if function.fn.__module__ == module.__name__]


def reached(function: Jit) -> set[Jit]:
    """A Triton function and all that it calls."""
    found, waiting = set(), [function]
    while waiting:
        function = waiting.pop()
        if function not in found:
            found.add(function)
            called = (function.fn.__globals__.get(name) for name in function.fn.__code__.co_names)
            waiting += [value for value in called if isinstance(value, Jit)]
    return found
