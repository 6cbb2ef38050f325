"""The package deep_ep: whether it is here, can run here, and is the one that a carrier was written for.

DeepEP's main branch and its branch hybrid-ep install under this one name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch
import torch.distributed as dist

from moe.errors import InputError
from moe.layer.dispatch_deepep import BUFFER_API, ELASTIC_API, BufferCarrier, ElasticCarrier
from moe.layer.dispatch_fused import Carrier, ExchangeSizes
from moe.layer.dispatch_hybridep import HYBRID_API, HybridCarrier

# Hopper and Blackwell of data centres.
COMPUTE_CAPABILITIES = ((9, 0), (10, 0), (10, 3))
# By the name of the dispatcher in a config: parallel.dispatcher.
_SOURCE = {
    "deepep": "DeepEP (github.com/deepseek-ai/DeepEP)",
    "hybridep": "HybridEP (github.com/deepseek-ai/DeepEP, branch hybrid-ep)",
}
FUSED = tuple(_SOURCE)
_INSTEAD = "or use parallel.dispatcher=hierarchical, which sends as many rows over the network, or alltoall"


def import_library(name: str) -> ModuleType:
    """The package deep_ep with what the dispatcher calls.

    Args:
        name: of the dispatcher, one of FUSED.

    Raises:
        InputError: it is absent, cannot be imported, or lacks a class, method or argument.
    """
    try:
        import deep_ep  # type: ignore[import-not-found]
    except (ImportError, OSError, AssertionError, RuntimeError) as error:  # it looks for NCCL and nvcc
        raise InputError(
            f"parallel.dispatcher={name} needs the package deep_ep, which cannot be imported "
            f"({type(error).__name__}: {error}): build {_SOURCE[name]} for sm_90 or sm_100, {_INSTEAD}"
        ) from error
    module: ModuleType = deep_ep
    require_api(name, module)
    return module


def require_api(name: str, deep_ep: ModuleType) -> None:
    """Raises InputError if a class, method or argument is absent that the dispatcher uses."""
    missing = _missing(deep_ep, _api(name, deep_ep))
    if missing:
        raise InputError(
            f"parallel.dispatcher={name}: deep_ep {version_of(deep_ep)} lacks {', '.join(missing)}; "
            f"install {_SOURCE[name]}, {_INSTEAD}"
        )


def require_gpu(name: str, device: torch.device) -> None:
    """Raises InputError if the library has no kernels for the device."""
    if device.type != "cuda":
        raise InputError(
            f"parallel.dispatcher={name} runs on CUDA only, and this rank computes on {device.type}; "
            "use parallel.dispatcher=hierarchical or alltoall"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability not in COMPUTE_CAPABILITIES:
        known = ", ".join(f"sm_{major}{minor}" for major, minor in COMPUTE_CAPABILITIES)
        raise InputError(
            f"parallel.dispatcher={name} runs on {known}, and {torch.cuda.get_device_name(device)} is "
            f"sm_{capability[0]}{capability[1]}; use parallel.dispatcher=hierarchical or alltoall"
        )


def build_carrier(name: str, deep_ep: ModuleType, group: dist.ProcessGroup, sizes: ExchangeSizes) -> Carrier:
    """The library with buffers for one exchange; collective over the group.

    Args:
        name: of the dispatcher, one of FUSED.
        deep_ep: of `import_library`.
        group: expert-parallel ranks.
        sizes: of the exchange.

    Raises:
        InputError: the library cannot serve such a group or such rows.
    """
    label = f"{name} (deep_ep {version_of(deep_ep)})"
    if name == "hybridep":
        return HybridCarrier(deep_ep, group, sizes, label)
    if _is_elastic(deep_ep):
        return ElasticCarrier(deep_ep, group, sizes, label)
    return BufferCarrier(deep_ep, group, sizes, label)


def version_of(deep_ep: ModuleType) -> str:
    """In words; DeepEP 1 has none in the module."""
    try:
        return str(getattr(deep_ep, "__version__", None) or version("deep_ep"))
    except PackageNotFoundError:
        return "of unknown version"


def _is_elastic(deep_ep: ModuleType) -> bool:
    return hasattr(deep_ep, "ElasticBuffer")


def _api(name: str, deep_ep: ModuleType) -> Mapping[str, tuple[str, ...]]:
    if name == "hybridep":
        return HYBRID_API
    return ELASTIC_API if _is_elastic(deep_ep) else BUFFER_API


def _missing(deep_ep: ModuleType, api: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Names that are absent: the class, a method, or an argument of one."""
    found = []
    for path, arguments in api.items():
        owner, _, method = path.partition(".")
        if not hasattr(deep_ep, owner):
            return [owner]
        function = getattr(getattr(deep_ep, owner), method, None)
        if function is None:
            found.append(path)
            continue
        parameters = inspect.signature(function).parameters
        found += [f"argument {name} of {path}" for name in arguments if name not in parameters]
    return found
