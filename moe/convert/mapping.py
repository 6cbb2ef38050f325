"""Small mappings between our tensors and those of a Hugging Face folder; a family is a table of them.

A mapping names one of our tensors and the foreign ones it is made of. `*` in a name stands for the layer's
number, `#` for the expert's. It cuts our tensor into parts, each of which is read, joined and written alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.errors import InputError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A region of one of our tensors, and the foreign tensors that hold its elements."""

    key: str
    whole_shape: Shape
    offset: Shape
    shape: Shape
    theirs: tuple[tuple[str, Shape], ...]  # names and shapes
    join: Callable[[Sequence[Tensor]], Tensor]  # theirs -> the region
    split: Callable[[Tensor], Sequence[Tensor]]  # the region -> theirs


@dataclass(frozen=True)
class Direct:
    """One foreign tensor of the same shape."""

    ours: str
    theirs: str
    first_layer: int = 0  # added to the layer's number in foreign names

    def parts(self, key: str, shape: Shape, layer: str) -> Iterator[Part]:
        """The whole tensor."""
        name = _named(self.theirs, layer, self.first_layer)
        yield _whole(key, shape, ((name, shape),), join=_only, split=lambda tensor: [tensor])


@dataclass(frozen=True)
class GateUp:
    """Gate and up projection of a SwiGLU, stacked along the rows."""

    ours: str
    theirs: tuple[str, str]
    first_layer: int = 0

    def parts(self, key: str, shape: Shape, layer: str) -> Iterator[Part]:
        """The whole tensor."""
        half = (shape[0] // 2, *shape[1:])
        names = tuple((_named(name, layer, self.first_layer), half) for name in self.theirs)
        yield _whole(key, shape, names, join=torch.cat, split=lambda tensor: tensor.chunk(2))


@dataclass(frozen=True)
class FusedQkv:
    """Query, key and value projection: for each group its queries, its key, its value. Weights and biases."""

    ours: str
    theirs: tuple[str, str, str]
    num_heads: int
    num_groups: int
    head_dim: int
    first_layer: int = 0

    def parts(self, key: str, shape: Shape, layer: str) -> Iterator[Part]:
        """The whole tensor."""
        rows = (self.num_heads * self.head_dim, *[self.num_groups * self.head_dim] * 2)
        names = (_named(name, layer, self.first_layer) for name in self.theirs)
        theirs = tuple((name, (n, *shape[1:])) for name, n in zip(names, rows, strict=True))
        yield _whole(key, shape, theirs, join=self._join, split=self._split)

    def _join(self, tensors: Sequence[Tensor]) -> Tensor:
        grouped = [tensor.unflatten(0, (self.num_groups, -1)) for tensor in tensors]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def _split(self, tensor: Tensor) -> list[Tensor]:
        d = self.head_dim
        queries = self.num_heads // self.num_groups * d
        parts = tensor.unflatten(0, (self.num_groups, -1)).split([queries, d, d], dim=1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class PerExpert:
    """Our stack over experts, of which the foreign folder holds each expert's matrices apart.

    Several matrices (gate, up) of an expert are stacked along the rows.
    """

    ours: str
    theirs: tuple[str, ...]
    first_layer: int = 0

    def parts(self, key: str, shape: Shape, layer: str) -> Iterator[Part]:
        """One part an expert."""
        num_experts, rows, columns = shape
        each = (rows // len(self.theirs), columns)
        names = [_named(name, layer, self.first_layer) for name in self.theirs]
        for expert in range(num_experts):
            yield Part(
                key,
                whole_shape=shape,
                offset=(expert, 0, 0),
                shape=(1, rows, columns),
                theirs=tuple((name.replace("#", str(expert)), each) for name in names),
                join=lambda tensors: torch.cat(list(tensors)).unsqueeze(0),
                split=lambda tensor: tensor.squeeze(0).chunk(len(self.theirs)),
            )


@dataclass(frozen=True)
class TransposedExperts:
    """A stack over experts of matrices that stand with their inputs in rows."""

    ours: str
    theirs: str

    def parts(self, key: str, shape: Shape, layer: str) -> Iterator[Part]:
        """The whole tensor."""
        num_experts, rows, columns = shape
        names = ((_named(self.theirs, layer, 0), (num_experts, columns, rows)),)
        yield _whole(key, shape, names, join=lambda t: _only(t).mT.contiguous(), split=lambda t: [t.mT])


@dataclass(frozen=True)
class InterleavedExperts:
    """A stack over experts of gate and up in turns: matrices with their inputs in rows, or biases."""

    ours: str
    theirs: str

    def parts(self, key: str, shape: Shape, layer: str) -> Iterator[Part]:
        """The whole tensor."""
        turned = (shape[0], *reversed(shape[1:]))
        names = ((_named(self.theirs, layer, 0), turned),)
        yield _whole(key, shape, names, join=self._join, split=self._split)

    def _join(self, tensors: Sequence[Tensor]) -> Tensor:
        pairs = _only(tensors).unflatten(-1, (-1, 2))  # [E, D, F, 2], or [E, F, 2]
        joined: Tensor = pairs.movedim((-1, -2), (1, 2)).flatten(1, 2)
        return joined

    def _split(self, tensor: Tensor) -> list[Tensor]:
        pairs = tensor.unflatten(1, (2, -1))  # [E, 2, F, D], or [E, 2, F]
        return [pairs.movedim((1, 2), (-1, -2)).flatten(-2)]


@dataclass(frozen=True)
class Zeros:
    """A tensor of ours that the family does not have, because there it is always zero."""

    ours: str

    def parts(self, key: str, shape: Shape, layer: str) -> Iterator[Part]:
        """The whole tensor."""

        def only_zeros(tensor: Tensor) -> Sequence[Tensor]:
            if tensor.count_nonzero():
                raise InputError(
                    f"{key} is not zero, and the family has no place for it; choose another family"
                )
            return ()

        yield _whole(key, shape, (), join=lambda _: torch.zeros(shape), split=only_zeros)


TensorMapping = Direct | GateUp | FusedQkv | PerExpert | TransposedExperts | InterleavedExperts | Zeros


def bind(table: Iterable[TensorMapping], shapes: Mapping[str, Shape], family: str) -> list[Part]:
    """Every part of every tensor of our model.

    Args:
        table: the family's; the first mapping whose name fits a tensor is its.
        shapes: our tensors by checkpoint key.
        family: for the message.

    Raises:
        InputError: the family has no name for one of our tensors.
    """
    patterns = [(re.compile(re.escape(entry.ours).replace(r"\*", r"(\d+)")), entry) for entry in table]
    parts: list[Part] = []
    homeless = []
    for key, shape in shapes.items():
        matches = ((pattern.fullmatch(key), entry) for pattern, entry in patterns)
        found = next(((match, entry) for match, entry in matches if match), None)
        if found is None:
            homeless.append(key)
        else:
            layer = found[0][1] if found[0].groups() else ""
            parts.extend(found[1].parts(key, shape, layer))
    if homeless:
        raise InputError(
            f"the family {family} has no tensor for {', '.join(homeless[:5])}"
            f"{' and others' if len(homeless) > 5 else ''} of this model; choose another family"
        )
    return parts


def _named(pattern: str, layer: str, first_layer: int) -> str:
    return pattern.replace("*", str(int(layer) + first_layer)) if "*" in pattern else pattern


def _only(tensors: Sequence[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


def _whole(
    key: str,
    shape: Shape,
    theirs: tuple[tuple[str, Shape], ...],
    *,
    join: Callable[..., Tensor],
    split: Callable[[Tensor], Sequence[Tensor]],
) -> Part:
    return Part(key, shape, (0,) * len(shape), shape, theirs, join, split)
