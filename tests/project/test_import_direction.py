"""Imports point one way: from the command line down to the config, and each third party has its place.

The order is that of the design; whoever adds a package to moe/ gives it a layer here.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the bottom up. A module imports its own package and what lies below, never a neighbour.
LAYERS = (
    {"errors"},
    {"config", "durable", "quiet", "ranks"},
    {"kernels", "optim", "counts"},
    {"layer", "transformers_backend"},
    {"moe"},  # the package itself, which may offer the layer
    {"model"},
    {"engine", "checkpoint", "metering", "data"},
    {"train", "launch", "planner", "convert"},
    {"energy"},
    {"cli_shared"},
    {"cli_convert", "cli_data", "cli_energy", "cli_launch"},
    {"cli"},
    {"__main__"},
)
# An engine writes its shards with the checkpoint's writer; a checkpoint knows engines by a protocol only.
NEIGHBOURS = {("engine", "checkpoint")}
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}

# Where a third party may be imported; elsewhere moe/ must work without it.
PLACES = {
    "megatron": (
        "moe.model",
        "moe.engine.deepspeed",
        "moe.engine.deepspeed_groups",
        "moe.engine.deepspeed_state",
        "moe.engine.megatron",
        "moe.engine.megatron_job",
        "moe.engine.megatron_moments",
        "moe.engine.megatron_optimizer",
        "moe.engine.megatron_state",
        "moe.engine.mtp_loss",
        "moe.engine.one_rank",
        "moe.engine.without_cuda",
        "moe.data.dataset",
        "moe.checkpoint",
    ),
    "deepspeed": (
        "moe.engine.deepspeed",
        "moe.engine.deepspeed_dtypes",
        "moe.engine.deepspeed_groups",
        "moe.engine.deepspeed_settings",
    ),
    "deep_ep": ("moe.layer.fused_library",),
    "wandb": ("moe.metering.sinks",),
    "transformers": ("moe.transformers_backend", "moe.convert"),
    "triton": ("moe.kernels",),
    "kernels": (),  # the top-level name is another project's; ours is moe.kernels
}


def _modules() -> dict[str, str]:
    """Source of every module by its name; kernels/ is imported as moe.kernels."""
    found = {}
    for top, prefix in ((ROOT / "moe", ("moe",)), (ROOT / "kernels", ("moe", "kernels"))):
        for path in top.rglob("*.py"):
            parts = (*prefix, *path.relative_to(top).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path.read_text()
    return found


MODULES = _modules()


def _imported(source: str) -> Iterator[str]:
    """Dotted names that a module imports, anywhere in it: in functions and for type checkers, too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            yield node.args[0].value if isinstance(node.args[0], ast.Constant) else ".computed"


def _is_in(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def _layer(name: str) -> str:
    """The part of moe/ that a dotted name lies in; a name that is no module is the package's own."""
    parts = name.split(".")
    return (
        parts[1]
        if len(parts) > 1 and any(_is_in(module, ".".join(parts[:2])) for module in MODULES)
        else "moe"
    )


def problems(module: str, source: str) -> list[str]:
    """The imports of a module that point the wrong way."""
    found = []
    own = _layer(module)
    for name in _imported(source):
        top = name.split(".")[0]
        if name.startswith("."):
            found.append(f"{module} imports {name}: write the full, constant name")
        elif top in PLACES and not any(_is_in(module, place) for place in PLACES[top]):
            found.append(f"{module} imports {name}; allowed in: {', '.join(PLACES[top]) or 'no file'}")
        elif top == "moe" and not _is_below(_layer(name), own):
            found.append(f"{module} imports {name}, which is not below it")
    return found


def _is_below(layer: str, own: str) -> bool:
    return layer == own or HEIGHT[layer] < HEIGHT[own] or (own, layer) in NEIGHBOURS


def cycle(modules: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle, or nothing."""

    def module_of(name: str) -> str | None:
        return name if name in modules else module_of(name.rpartition(".")[0]) if "." in name else None

    graph = {
        module: {target for name in _imported(source) if (target := module_of(name)) not in (None, module)}
        for module, source in modules.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return []


def test_every_part_of_moe_has_a_layer():
    parts = {name.split(".")[1] for name in MODULES if "." in name}
    assert parts <= HEIGHT.keys(), "give the new part of moe/ its layer in this file"
    assert {"cli", "train", "engine", "layer", "kernels", "config"} <= parts  # the walk finds the modules


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    assert problems(module, MODULES[module]) == []


def test_no_modules_import_each_other_in_a_circle():
    assert cycle(MODULES) == []


@pytest.mark.parametrize("folder", ["tests", "scripts", "benchmarks"])
def test_kernels_are_imported_through_moe(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert not [name for name in _imported(path.read_text()) if _is_in(name, "kernels")], path


PLANTED = [
    ("moe.layer.router", "import megatron.core"),
    ("moe.layer.router", "def f():\n    from megatron.core import parallel_state"),
    ("moe.layer.router", "if TYPE_CHECKING:\n    from moe.model.build import build_model"),
    ("moe.engine.base", "from megatron.core import parallel_state"),
    ("moe.engine.megatron", "import deepspeed"),
    ("moe.metering.console", "import wandb"),
    ("moe.layer.experts", "import triton.language as tl"),
    ("moe.layer.experts", "from kernels.combine import combine"),
    ("moe.layer.experts", "import kernels"),
    ("moe.layer.experts", "from transformers.activations import ACT2FN"),
    ("moe.checkpoint.load", "from moe.engine.base import Engine"),
    ("moe.data.prepare", "from moe.metering import sinks"),
    ("moe.config.load", "import moe.ranks"),
    ("moe.config.load", "from moe import layer"),
    ("moe.errors", "from moe.config import RunConfig"),
    ("moe.train.loop", "from moe.launch.local import launch_local"),
    ("moe.train.loop", "from ..layer import MoELayer"),
    ("moe.train.loop", "import importlib\nimportlib.import_module('wandb')"),
    ("moe.train.loop", "import importlib\nimportlib.import_module(name)"),
    ("moe.kernels.combine.op", "from moe.layer.types import Routing"),
    ("moe.model.build", "from moe.cli import main"),
]


@pytest.mark.parametrize(("module", "source"), PLANTED)
def test_planted_import_is_caught(module, source):
    assert len(problems(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("moe.kernels.combine.triton_kernel", "import triton"),
        ("moe.cli", "from moe import __version__\nfrom moe.train.run import run_job"),
        (
            "moe.layer.router",
            "from moe.kernels.topk_route import topk_route\nfrom moe.layer.types import Routing",
        ),
        ("moe.engine.megatron", "import megatron_fsdp_like_name, tritonish, wandb_like"),
    ],
)
def test_import_that_points_down_passes(module, source):
    assert problems(module, source) == []


def test_planted_circle_is_caught():
    circle = {
        "moe.a": "from moe.b import f",
        "moe.b": "def g():\n    import moe.c",
        "moe.c": "from moe import a",
    }
    assert set(cycle(circle)) == {"moe.a", "moe.b", "moe.c"}
    assert cycle({**circle, "moe.c": "from moe import d"}) == []
