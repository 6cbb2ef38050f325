"""Kills its own process at one point of a run, once. Python imports it at start from PYTHONPATH.

KILL_AT is `rank:step:module:function`: the rank that ends by SIGKILL when it enters the function in that
optimizer step, counted from 1. KILL_MARK is a file that is made just before, so that it happens once.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

# Entered once for each optimizer step.
STEP = ("moe.engine.megatron", "MegatronEngine.train_step")


class Killer:
    """Counts the steps of this rank and ends it."""

    def __init__(self, step: int, mark: Path) -> None:
        self.step = step
        self.mark = mark
        self.steps = 0

    def count(self) -> None:
        self.steps += 1

    def kill(self) -> None:
        if self.steps == self.step:
            with suppress(FileExistsError):
                self.mark.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)


class CallFirst(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads a module as usual, then lets a function of it call `action` before anything else."""

    def __init__(self, module: str, function: str, action: Callable[[], None]) -> None:
        self.module, self.function, self.action = module, function, action

    def find_spec(self, name: str, path: Any, _target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)  # a hook for the same module may come after this one
        spec = importlib.util.find_spec(name)
        assert spec is not None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        *classes, name = self.function.split(".")
        owner: Any = module
        for part in classes:
            owner = getattr(owner, part)
        original, action = getattr(owner, name), self.action

        def replacement(*args: Any, **kwargs: Any) -> Any:
            action()
            return original(*args, **kwargs)

        is_static = isinstance(vars(owner).get(name), staticmethod)
        setattr(owner, name, staticmethod(replacement) if is_static else replacement)


if "KILL_AT" in os.environ and os.environ["KILL_AT"].partition(":")[0] == os.environ.get("RANK"):
    _, at_step, at_module, at_function = os.environ["KILL_AT"].split(":")
    killer = Killer(int(at_step), Path(os.environ["KILL_MARK"]))
    sys.meta_path[:0] = [CallFirst(*STEP, killer.count), CallFirst(at_module, at_function, killer.kill)]
