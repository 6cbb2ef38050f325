"""Writes safetensors one tensor at a time.

The safetensors library takes all tensors of a file at once and copies them; a file of some gigabytes would
then have to fit into memory twice. The format (https://github.com/huggingface/safetensors, "Format") is eight
bytes of header length, a JSON header, the tensors' bytes in the header's order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe.convert.hf_reader import INDEX_FILE, SINGLE_FILE
from moe.convert.mapping import Shape
from moe.durable import atomic_writer, storage_error, write_atomically

FILE_BYTES = 5 * 10**9  # of a file, unless one tensor alone is larger; the long-time default of transformers
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Layout = Mapping[str, tuple[Shape, str]]  # shape and dtype of each tensor, in the order of writing


def write_safetensors(folder: Path, layout: Layout, read: Callable[[str], Tensor]) -> None:
    """Write `model.safetensors`, or several files and their index.

    Args:
        folder: exists.
        layout: every tensor.
        read: gives one; it is kept no longer than its bytes take to write.

    Raises:
        InputError: a file cannot be written; the text says "no space" where that is the cause.
    """
    files = _files(layout)
    for file, names in files.items():
        try:
            _write_file(folder / file, {name: layout[name] for name in names}, read)
        except OSError as error:
            raise storage_error(folder / file, error) from error
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(_size_bytes(*entry) for entry in layout.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _files(layout: Layout) -> dict[str, list[str]]:
    """Names of the tensors of each file."""
    groups: list[list[str]] = [[]]
    filled_bytes = 0
    for name, entry in layout.items():
        size_bytes = _size_bytes(*entry)
        if groups[-1] and filled_bytes + size_bytes > FILE_BYTES:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(name)
        filled_bytes += size_bytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _write_file(path: Path, layout: Layout, read: Callable[[str], Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in layout.items():
        end = offset + _size_bytes(shape, dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors' bytes are aligned
    with atomic_writer(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in layout.items():
            tensor = read(name).to(TORCH_DTYPES[dtype]).contiguous()
            assert tuple(tensor.shape) == shape, (name, tensor.shape, shape)
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)


def _size_bytes(shape: Shape, dtype: str) -> int:
    return math.prod(shape) * TORCH_DTYPES[dtype].itemsize
