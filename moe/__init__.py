"""JouleMoE: sparse Mixture-of-Experts training, with tokens per joule measured.

    from moe import MoEConfig, MoELayer

The names below come from `moe.layer` and `moe.transformers_backend`, imported when they are first asked for:
`import moe` costs nothing, and the layer imports neither Megatron nor DeepSpeed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe.layer import AllToAllDispatcher, GroupedExperts, LocalDispatcher, MoEConfig, MoELayer, Router
    from moe.transformers_backend import register_with_transformers

__version__ = "0.1.0"

__all__ = [
    "AllToAllDispatcher",
    "GroupedExperts",
    "LocalDispatcher",
    "MoEConfig",
    "MoELayer",
    "Router",
    "register_with_transformers",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'moe' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = "moe.transformers_backend" if name == "register_with_transformers" else "moe.layer"
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
