"""Which implementation of an op runs: `triton` on CUDA, `torch` anywhere. A named one is used or refused."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Literal, cast

import torch

Backend = Literal["triton", "torch"]
BACKENDS = ("auto", "triton", "torch")


def choose_backend(backend: str, tensor: torch.Tensor) -> Backend:
    """The implementation for an op on `tensor`.

    Args:
        backend: `auto` takes triton on CUDA and torch elsewhere.
        tensor: the op's main input.

    Raises:
        ValueError: the name is unknown, or triton is asked for on a device that it cannot run on.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; allowed: {', '.join(BACKENDS)}")
    if backend == "auto":
        return "triton" if tensor.is_cuda else "torch"
    if backend == "triton" and not tensor.is_cuda and not interpreted():
        raise ValueError(
            f"backend='triton' needs a CUDA tensor, got one on {tensor.device}; use 'auto' or 'torch', "
            "or set TRITON_INTERPRET=1 before triton is imported to run its interpreter in a test"
        )
    return cast(Backend, backend)


def interpreted() -> bool:
    """Whether Triton's kernels run in its CPU interpreter, as tests without a GPU have them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def load_driver() -> None:
    """Have Triton build and load its CUDA driver now, which it else does at the first launch of a kernel.

    It compiles C for that (triton/backends/nvidia/driver.py, `CudaUtils`), unless its cache has the result.

    Raises:
        ValueError: Triton, a C compiler, the headers of Python or libcuda are missing; it names the remedy.
    """
    try:
        from triton.runtime import driver

        driver.active.utils  # noqa: B018
    except (RuntimeError, AssertionError, OSError, ImportError, subprocess.CalledProcessError) as error:
        missing = _missing(error)
        if missing is None:
            raise
        raise ValueError(f"Triton cannot start a kernel: {missing}, or use engine.kernels=torch") from error


def _missing(error: Exception) -> str | None:
    """What this machine lacks and the remedy; None if the error says nothing of the kind."""
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        return "it is not installed; install triton"
    if isinstance(error, RuntimeError):
        no_compiler = "C compiler" in str(error)
        return "no C compiler was found; install gcc, or set CC to one" if no_compiler else None
    if isinstance(error, OSError):
        return _not_run(str(error.filename))
    if isinstance(error, subprocess.CalledProcessError):
        return _failed_build(str(error.cmd[0]))
    if "libcuda" in str(error):
        return "libcuda.so.1 was not found; install NVIDIA's driver, or set TRITON_LIBCUDA_PATH to its folder"
    return None


def _not_run(path: str) -> str | None:
    if path.endswith("ldconfig"):
        return f"{path} does not run; set TRITON_LIBCUDA_PATH to the folder of libcuda.so.1"
    if path == os.environ.get("CC"):
        return f"the C compiler CC={path} does not run; install gcc, or set CC to one that does"
    return None


def _failed_build(program: str) -> str | None:
    if program.endswith("ldconfig"):
        return _not_run(program)
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").is_file():
        return f"{folder} has no Python.h; install the headers of this Python (python3-dev or python3-devel)"
    return f"{program} failed with what it printed above; install gcc with libc's headers, or set CC to one"
