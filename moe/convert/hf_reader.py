"""Reads a Hugging Face folder: its config, the headers of its safetensors, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe.convert.mapping import Shape
from moe.errors import InputError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = ("F32", "BF16", "F16")
_DERIVED = ".self_attn.rotary_emb.inv_freq"
_MOST_LISTED = 20  # problems in one message


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    file: Path
    shape: Shape
    dtype: str  # as safetensors names it


class HfFolder:
    """A folder as `save_pretrained` writes it.

    Attributes:
        path: the folder.
        config: the content of config.json.
        tensors: every tensor by name, but for the rotary frequencies that old versions of transformers saved
            and no version reads: config.json determines them.
    """

    def __init__(self, path: Path) -> None:
        """Read config and headers, no tensor.

        Raises:
            InputError: a file is missing or damaged, a tensor stands twice; the text names it.
        """
        self.path = path
        self.config = _read_json(path / CONFIG_FILE)
        self.tensors: dict[str, TensorInfo] = {}
        for file in _weight_files(path):
            for name, info in _header(file).items():
                if name.endswith(_DERIVED):
                    continue
                if name in self.tensors:
                    raise InputError(
                        f"{name} stands in {self.tensors[name].file} and in {file}; remove one of the two"
                    )
                self.tensors[name] = info

    def read(self, name: str, region: tuple[slice, ...] | None = None) -> Tensor:
        """One tensor, or a region of it. The file is opened for it alone, so that nothing of it stays mapped.

        Raises:
            InputError: the file cannot be read.
        """
        file = self.tensors[name].file
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name) if region is None else opened.get_slice(name)[region]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: cannot read {name}: {error}. Copy the file again.") from error
        return tensor


def check_tensors(folder: HfFolder, shapes: Mapping[str, Shape], copies: Mapping[str, str]) -> None:
    """Compare a folder's headers with what a model is made of.

    Args:
        folder: its headers are enough, but for copies.
        shapes: of every tensor of the model.
        copies: tensors that may be there, and the one that each must equal.

    Raises:
        InputError: names every tensor that is missing, not known, or of another shape or an unknown dtype,
            and every copy that differs.
    """
    expected = dict(shapes)
    problems = [f"{name}: missing" for name in expected if name not in folder.tensors]
    expected |= {copy: expected[name] for copy, name in copies.items() if copy in folder.tensors}
    problems += [
        f"{name}: no place for it in the model that config.json describes"
        for name in folder.tensors
        if name not in expected
    ]
    for name in expected.keys() & folder.tensors.keys():
        info = folder.tensors[name]
        if info.shape != expected[name]:
            problems.append(f"{name}: its shape is {list(info.shape)}, expected {list(expected[name])}")
        if info.dtype not in DTYPES:
            problems.append(f"{name}: its dtype is {info.dtype}; allowed: {', '.join(DTYPES)}")
    if not problems:
        problems = [
            f"{copy}: differs from {name}, which it should repeat"
            for copy, name in copies.items()
            if copy in folder.tensors and not torch.equal(folder.read(copy), folder.read(name))
        ]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in sorted(problems)[:_MOST_LISTED])
        more = len(problems) - _MOST_LISTED
        raise InputError(
            f"{folder.path}: {len(problems)} tensor(s) do not fit its config.json, nothing was written:\n"
            f"{listed}" + (f"\n  and {more} more" if more > 0 else "")
        )


def _weight_files(path: Path) -> list[Path]:
    """The files that the index names, or the single one; others are not read."""
    if not (path / INDEX_FILE).exists():
        return [path / SINGLE_FILE]
    weight_map = _read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{path / INDEX_FILE} has no weight_map; copy the file again")
    outside = [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise InputError(f"{path / INDEX_FILE} names {outside[0]!r}, which is no file of the folder")
    return [path / name for name in sorted(set(weight_map.values()))]


def _header(file: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            return {
                name: TensorInfo(file, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing; give a folder that holds safetensors") from error
    except (OSError, SafetensorError) as error:
        cut = _cut_off(file)
        what = f"it ends before {cut[0]} does" if cut else str(error)
        raise InputError(f"{file} is damaged: {what}. Copy the file again.") from error


def _cut_off(file: Path) -> list[str]:
    """The tensors that a truncated file lacks, in whole or in part; none if it is damaged otherwise."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        size = file.stat().st_size - 8 - length
        if size < 0:
            return []
        try:
            entries = json.loads(opened.read(length))
        except ValueError:
            return []
    ends = {name: entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"}
    return sorted(name for name, end in ends.items() if end > size)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; give the folder of a Hugging Face model") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content
