"""GPUs by name, or by a file that says how a machine differs from one of them.

base: h100
name: h800
nvlink_bytes_per_s: 200e9
efficiency:
gemm_bf16: 0.65  # measured here
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe.config.tree import ConfigTree
from moe.errors import InputError
from moe.planner.hardware import GPUS, Efficiency, Gpu


def find_gpu(name: str) -> Gpu:
    """The constants of a kind of GPU.

    Args:
        name: A kind that the planner knows, or the path of a YAML file.

    Raises:
        InputError: There is no such kind or file, or the file is wrong.
    """
    if name in GPUS:
        return GPUS[name]
    if Path(name).suffix not in (".yaml", ".yml"):
        raise InputError(
            f"--gpu {name}: unknown; allowed: {', '.join(GPUS)}, or a YAML file with base: one of them"
        )
    return _read(Path(name))


def _read(path: Path) -> Gpu:
    values = dict(ConfigTree(path).values)
    base = values.pop("base", None)
    if base not in GPUS:
        raise InputError(f"{path}: base={base} must be one of {', '.join(GPUS)}")
    gpu = GPUS[base]
    name = str(values.pop("name", path.stem))
    if name in GPUS:
        raise InputError(f"{path}: {name} is a kind that the planner knows; give this machine another name")
    peaks = _numbers(path, "peak_flops", values.pop("peak_flops", {}), dict(gpu.peak_flops))
    shares = _numbers(path, "efficiency", values.pop("efficiency", {}), dataclasses.asdict(gpu.efficiency))
    if max(shares.values()) > 1:
        raise InputError(f"{path}: efficiency holds shares of peak, at most 1, got {max(shares.values())}")
    plain = {
        field.name: getattr(gpu, field.name)
        for field in dataclasses.fields(Gpu)
        if field.name not in ("name", "peak_flops", "efficiency")
    }
    return Gpu(
        name=name,
        peak_flops=MappingProxyType(peaks),
        efficiency=Efficiency(**shares),
        **_numbers(path, "", values, plain),
    )


def _numbers(path: Path, section: str, given: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """The defaults with what is given in their place."""
    if not isinstance(given, dict):
        raise InputError(f"{path}: {section}={given} must be a section of {', '.join(defaults)}")
    for key, value in given.items():
        where = f"{section}.{key}" if section else key
        if key not in defaults:
            raise InputError(f"{path}: unknown key {where}; allowed: {', '.join(defaults)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise InputError(f"{path}: {where}={value} must be a number above 0")
    return {**defaults, **given}
