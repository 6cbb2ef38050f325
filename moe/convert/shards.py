"""Our checkpoint's tensors, written and read region by region, in the format of torch's DCP.

Megatron's loader reads what is written here in any layout; what training wrote can be read here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import IOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    SerializationFormat,
    _write_item,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from moe.checkpoint.pickle_gate import DCP_METADATA_GLOBALS, check_pickle
from moe.convert.mapping import Part, Shape
from moe.durable import write_atomically

FILE_BYTES = 4 * 2**30  # of a shard file, unless one region alone is larger
METADATA_FILE = ".metadata"


def write_shards(
    directory: Path,
    parts: Sequence[Part],
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[Part], Tensor],
) -> None:
    """Write every part; each is asked for when its turn comes and forgotten when it is written.

    Args:
        directory: exists and is empty.
        parts: together they cover each tensor once.
        dtypes: of each tensor, by key.
        read: gives a part's region in the dtype of its tensor.

    Raises:
        OSError: a file cannot be written.
    """
    planner = _StreamingPlanner(parts, dtypes, read)
    save({}, storage_writer=_StreamingWriter(directory), planner=planner, no_dist=True)
    # What Megatron's loader looks for before it opens the shards.
    write_atomically(
        directory / "metadata.json", '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    )
    torch.save({}, directory / "common.pt")


class _StreamingPlanner(SavePlanner):
    """One write item a part; its data is made when the writer asks for it."""

    def __init__(
        self, parts: Sequence[Part], dtypes: Mapping[str, torch.dtype], read: Callable[[Part], Tensor]
    ) -> None:
        self._parts = {(part.key, part.offset): part for part in parts}
        self._dtypes = dtypes
        self._read = read

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to prepare: the parts are the state."""

    def create_local_plan(self) -> SavePlan:
        """All parts, in their order."""
        return SavePlan([self._item(part) for part in self._parts.values()])

    def _item(self, part: Part) -> WriteItem:
        chunk = ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.shape))
        properties = TensorProperties(dtype=self._dtypes[part.key])
        return WriteItem(
            index=MetadataIndex(part.key, part.offset),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, properties, torch.Size(part.whole_shape)),
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The plan and its description."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Unchanged."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The region of one part."""
        index = write_item.index
        assert index.offset is not None
        part = self._parts[index.fqn, tuple(index.offset)]
        tensor = self._read(part)
        assert (tuple(tensor.shape), tensor.dtype) == (part.shape, self._dtypes[part.key]), index
        return tensor


class _StreamingWriter(FileSystemWriter):
    """torch's writer keeps every tensor of a file until the file is closed; this one keeps none."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items in their order, into files of about FILE_BYTES."""
        results: list[WriteResult] = []
        waiting = list(reversed(plan.items))
        number = 0
        while waiting:
            name = f"__0_{number}.distcp"
            with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
                while waiting and stream.tell() < FILE_BYTES:
                    results.append(self._write(stream, name, waiting.pop(), planner))
            number += 1
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write(self, stream: IOBase, name: str, item: WriteItem, planner: SavePlanner) -> WriteResult:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor)
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes whole storages
        return _write_item(self.transforms, stream, tensor, item, name, SerializationFormat.TORCH_SAVE)


class ShardReader:
    """Reads regions of a checkpoint's tensors.

    Attributes:
        shapes: whole shape of every tensor by key, optimizer state included.
        dtypes: in which they are stored.
    """

    def __init__(self, directory: Path) -> None:
        """Read the description, no tensor.

        Args:
            directory: a folder whose files were verified.

        Raises:
            CorruptCheckpointError: the description names foreign code.
        """
        check_pickle(directory / METADATA_FILE, DCP_METADATA_GLOBALS)
        self._reader = FileSystemReader(directory)
        self._directory = directory
        self._metadata = self._reader.read_metadata()
        self._tensors = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.shapes: dict[str, Shape] = {key: tuple(entry.size) for key, entry in self._tensors.items()}
        self.dtypes = {key: entry.properties.dtype for key, entry in self._tensors.items()}
        self._held: tuple[MetadataIndex, Tensor] | None = None

    def read(self, key: str, offset: Shape, shape: Shape) -> Tensor:
        """A region of a tensor. The chunk that was read last is kept, for regions beside each other."""
        entry = self._tensors[key]
        for number, chunk in enumerate(entry.chunks):
            if (tuple(chunk.offsets), tuple(chunk.sizes)) == (offset, shape):
                return self._chunk(MetadataIndex(key, chunk.offsets, number))
        region = torch.empty(shape, dtype=entry.properties.dtype)
        for number, chunk in enumerate(entry.chunks):
            inside = [
                (max(o, c), min(o + s, c + n))
                for o, s, c, n in zip(offset, shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(low < high for low, high in inside):
                stored = self._chunk(MetadataIndex(key, chunk.offsets, number))
                source = tuple(slice(a - c, b - c) for (a, b), c in zip(inside, chunk.offsets, strict=True))
                target = tuple(slice(a - o, b - o) for (a, b), o in zip(inside, offset, strict=True))
                region[target] = stored[source]
        return region

    def _chunk(self, index: MetadataIndex) -> Tensor:
        if self._held is None or self._held[0] != index:
            self._held = None  # freed before the next is read
            place = self._metadata.storage_data[index]
            with (self._directory / place.relative_path).open("rb") as file:
                view = self._reader._slice_file(file, place)
                tensor = torch.load(view, map_location="cpu", weights_only=True)
            self._held = (index, tensor)
        return self._held[1]
