"""Closes the two pickles inside a torch.distributed.checkpoint (DCP) folder before torch opens them.

1. `.metadata` is read by torch with an unrestricted `pickle.load`: a hostile file runs any program
   (pytorch issue 189308). `check_pickle` reads it first with every class replaced by an inert stand-in and
   refuses names outside an allow-list. It uses the interpreter's own unpickling machine, not a parser of
   opcodes: what it sees is by construction what `pickle.load` will see, memo tricks included, and what it
   cannot resolve raises. A list made with `pickletools` would need a second implementation of that machine,
   and a difference between the two is how scanners of that kind are evaded.
2. Objects that are not tensors are read from the `.distcp` files with `torch.load(weights_only=False)`.
   `weights_only_forced` makes torch use its restricted reader for them, and for `common.pt`.

The gate bounds what runs, not how much memory or time a hostile file can waste.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe.errors import CorruptCheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_DTYPES = (
    "bfloat16 float16 float32 float64 complex64 complex128 "
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
    "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2"
)

DCP_METADATA_GLOBALS: frozenset[tuple[str, str]] = frozenset(
    # Listed from `.metadata` files saved with torch 2.13.0, alone and under megatron-core 0.16.1.
    {
        *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
        *(
            (_METADATA, name)
            for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata")
        ),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        # Megatron keeps every rank's save plan in the metadata.
        *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType")),
        *((_PLANNER, name) for name in ("TensorWriteData", "BytesIOWriteData")),
        *(("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
        ("torch.serialization", "_get_layout"),  # looks a layout up by its name, in a table
        ("torch", "Size"),
        *(("torch", name) for name in _DTYPES.split()),
        # The folder that DCP was given; Python 3.13 moved the class.
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    }
)


def check_pickle(path: Path, allowed: frozenset[tuple[str, str]]) -> None:
    """Refuse a pickle that names anything outside `allowed`; nothing named in it is imported or called.

    Args:
        path: the pickle.
        allowed: the (module, name) pairs that it may refer to.

    Raises:
        CorruptCheckpointError: a name outside `allowed`, or a file that is not a well-formed pickle.
    """
    try:
        with path.open("rb") as file:
            _StandInUnpickler(file, path, allowed).load()
    except CorruptCheckpointError:
        raise
    except Exception as error:  # whatever a malformed pickle makes the machine raise, it is refused
        raise CorruptCheckpointError(
            f"{path} is not a well-formed pickle ({type(error).__name__}: {error}). Use an older checkpoint."
        ) from error


@contextmanager
def weights_only_forced() -> Iterator[None]:
    """Make every `torch.load` inside the block use the restricted reader, whatever its caller asked for.

    Torch reads the two variables at each call; both are put back at the end.
    Source: torch/serialization.py, `TORCH_FORCE_WEIGHTS_ONLY_LOAD`.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class _StandIn:
    """Accepts what a pickle does to an object and keeps nothing."""

    def __new__(cls, *_args: object, **_kwargs: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


class _StandInUnpickler(pickle.Unpickler):
    """Unpickles into stand-ins. Persistent ids are refused by the base class."""

    def __init__(self, file: object, path: Path, allowed: frozenset[tuple[str, str]]) -> None:
        super().__init__(file)  # type: ignore[arg-type]
        self._path = path
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> type[_StandIn]:
        """Called by the machine for every global; returns a class of its own for each."""
        if (module, name) not in self._allowed:
            raise CorruptCheckpointError(
                f"{self._path} refers to {module}.{name}, which no checkpoint needs; loading it could run "
                "foreign code. Use a checkpoint from a source that you trust."
            )
        return type(name, (_StandIn,), {})
