"""What lets Megatron-Core run where CUDA is absent.

Megatron names CUDA directly in places: it allocates counters with device="cuda", asks torch.cuda for its
current device, opens streams. On a machine without CUDA each such name is pointed at the CPU for as long as
the context is open, and put back on exit. Where CUDA exists this does nothing. No computation is replaced:
what runs on the CPU is Megatron's own code over gloo.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _NullStream:
    """A stream or event on a device that runs everything in order anyway."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> _NullStream:
        return self

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _CudaMeansCpu(TorchFunctionMode):
    """device="cuda" in factories and .to("cuda") go to the CPU: the schedules and the gradient norm."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if len(args) > 1 and _is_cuda(args[1]) and getattr(func, "__name__", "") == "to":
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _type_named_as_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Tensor.type(): the bf16 optimizer knows parameters only by names such as torch.cuda.BFloat16Tensor."""
    name = _TENSOR_TYPE(self, *args, **kwargs)
    return f"torch.cuda.{name.rpartition('.')[2]}" if isinstance(name, str) else name


_TENSOR_TYPE = torch.Tensor.type


def _set_rng(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _get_rng(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """(object, attribute, stand-in), each with its reason."""
    cuda = torch.cuda
    # Megatron asks for the current device to place tensors, and to fence timers and pipelines.
    yield cuda, "current_device", lambda: CPU
    yield cuda, "set_device", lambda *_: None
    yield cuda, "synchronize", lambda *_, **__: None
    yield cuda, "is_current_stream_capturing", lambda: False
    # The schedules and the gradient buckets open side streams.
    yield cuda, "Stream", _NullStream
    yield cuda, "Event", _NullStream
    yield cuda, "current_stream", lambda *_: _NullStream()
    yield cuda, "default_stream", lambda *_: _NullStream()
    yield cuda, "stream", lambda *_: contextlib.nullcontext()
    # The tensor-parallel random tracker forks the CUDA generator; here the CPU generator takes its part.
    yield cuda, "manual_seed", torch.manual_seed
    for module in (cuda, cuda.random):
        yield module, "get_rng_state", _get_rng
        yield module, "set_rng_state", _set_rng
    from megatron.core.tensor_parallel import random as megatron_random

    yield megatron_random, "_set_cuda_rng_state", _set_rng
    yield torch.Tensor, "cuda", lambda self, *_, **__: self
    yield torch.Tensor, "type", _type_named_as_cuda


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """Point Megatron's CUDA names at the CPU inside the context; inert where CUDA exists."""
    if torch.cuda.is_available():
        yield
        return
    with contextlib.ExitStack() as undo:
        for owner, name, stand_in in _replacements():
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, stand_in)
        undo.enter_context(_CudaMeansCpu())
        yield
