"""Versions of what a run uses, and whether all nodes have the same."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from moe import __version__
from moe.errors import InputError
from moe.kernels.backend import load_driver
from moe.launch.doctor.check import Check

NEEDED = ("torch", "megatron-core")
OPTIONAL = ("triton", "deepspeed", "nvidia-ml-py", "transformer-engine", "deep_ep")


def check_versions(needed: Sequence[str] = NEEDED) -> Check:
    """The versions in this interpreter."""
    found = {name: _version(name) for name in (*needed, *OPTIONAL)}
    text = ", ".join(f"{name} {number}" for name, number in found.items() if number is not None)
    text = f"moe {__version__}, python {platform.python_version()}, {text}"
    missing = [name for name in needed if found[name] is None]
    if missing:
        remedy = "install the training extra: pip install 'joulemoe[train]'"
        return Check("versions", "fail", f"{text}; missing: {', '.join(missing)}", remedy)
    return Check("versions", "ok", text)


def check_dispatcher(name: str) -> Check:
    """Whether the package is here that parallel.dispatcher=deepep or hybridep calls."""
    from moe.layer.fused_library import import_library, version_of

    try:
        found = import_library(name)
    except InputError as error:
        cause = error.__cause__
        absent = isinstance(cause, ModuleNotFoundError) and cause.name == "deep_ep"
        found_what = "not found" if absent else "not usable"
        return Check("dispatcher", "fail", f"parallel.dispatcher={name}: deep_ep {found_what}", str(error))
    return Check("dispatcher", "ok", f"parallel.dispatcher={name}: deep_ep {version_of(found)}")


def check_triton(*, has_gpu: bool) -> Check:
    """Whether Triton can compile and load what starts its kernels.

    Args:
        has_gpu: torch sees one.
    """
    if not has_gpu:
        return Check("triton", "skipped", "torch sees no GPU that would run its kernels")
    try:
        load_driver()
    except ValueError as error:
        return Check("triton", "fail", "its kernels cannot start", str(error))
    return Check("triton", "ok", "its driver is built and loaded")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_same(name: str, values: Sequence[str]) -> Check:
    """Whether all nodes say the same of one check, such as versions or driver.

    Args:
        name: The check that is compared.
        values: Its value on every node, in node order.
    """
    odd = {value: nodes for value in values if len(nodes := _nodes_with(values, value)) < len(values)}
    if not odd:
        return Check(f"same {name}", "ok", f"on {len(values)} node(s)")
    text = "; ".join(f"node {', '.join(map(str, nodes))}: {value}" for value, nodes in odd.items())
    return Check(f"same {name}", "fail", text, "give every node the same image or environment")


def _nodes_with(values: Sequence[str], value: str) -> list[int]:
    return [node for node, other in enumerate(values) if other == value]
