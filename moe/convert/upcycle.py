"""Sparse upcycling: a dense Hugging Face model becomes a mixture of experts that computes the same.

Each feed-forward is copied (arXiv 2212.05055), and each copy may be cut into slices, of which each becomes an
expert (the virtual groups of arXiv 2410.07524). Expert e is slice e % slices of copy e // slices; the router
scores the slices of a copy alike, so top-k takes whole copies. Its weights sum to one over the k chosen
experts: each slice gets 1 / slices of what its copy is due, and its down projection is multiplied by `slices`
in return. Until training moves the weights, the outputs are those of the dense model.

What tells the copies apart is the router, which is drawn at random and sends them different tokens; noise
does it before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moe.convert.families.base import need
from moe.convert.families.dense import DenseFamily, Experts, dense_family_of
from moe.convert.hf_reader import HfFolder, check_tensors
from moe.convert.logits import TOLERANCE, LogitCheck, compare_logits
from moe.convert.mapping import Part, Shape, bind
from moe.convert.model_of import run_config
from moe.convert.text_files import text_files_of
from moe.convert.write_checkpoint import Incoming, refuse_existing, write_checkpoint
from moe.engine.one_rank import tensor_shapes
from moe.errors import InputError
from moe.model.init import seeded_normal

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Upcycling:
    """What the experts are made of.

    Attributes:
        num_experts: E; a multiple of slices.
        top_k: experts a token, K; a multiple of slices, at least two.
        slices: experts that a copy of the feed-forward is cut into; a power of two, so that multiplying by it
            rounds nothing. 1 makes each expert a whole copy.
        noise: standard deviation of what is added to each expert's matrices, over the matrix's own. 0 adds
            nothing, and the start is exactly the dense model.
        seed: of the router and the noise.
    """

    num_experts: int
    top_k: int
    slices: int = 1
    noise: float = 0.0
    seed: int = 1234

    def check(self, feed_forward_size: int) -> None:
        """Raise InputError naming every value that cannot work with such a feed-forward."""
        problems = list(self._problems(feed_forward_size))
        if problems:
            raise InputError("; ".join(problems))

    def _problems(self, feed_forward_size: int) -> Iterator[str]:
        slices = self.slices
        if slices < 1 or slices & (slices - 1):
            yield f"--slices {slices} must be 1, 2, 4, 8, ...: another factor would round the weights"
            return
        if feed_forward_size % slices:
            yield f"--slices {slices} does not divide intermediate_size={feed_forward_size}"
        for option, value in (("--experts", self.num_experts), ("--top-k", self.top_k)):
            if value < 1 or value % slices:
                yield f"{option} {value} must be a positive multiple of --slices {slices}"
        if self.top_k == 1 and slices == 1:
            yield "--top-k 1 would never train the router: one weight, divided by itself, is 1; use 2 or more"
        if self.top_k > self.num_experts:
            yield f"--top-k {self.top_k} is more than --experts {self.num_experts}"
        if not 0 <= self.noise < math.inf:
            yield f"--noise {self.noise} must be 0 or more"


@dataclass(frozen=True)
class _Origin:
    """Where a tensor of the upcycled model comes from."""

    dense: str
    shape: Shape  # of the dense tensor
    region: tuple[slice, ...] | None = None  # of it; None: the whole
    factor: int = 1


def upcycle(
    dense_dir: Path,
    checkpoint: Path,
    upcycling: Upcycling,
    *,
    check_logits: bool,
    note: Callable[[str], None],
) -> LogitCheck | None:
    """Write a checkpoint that `train.init_from` starts from; an export of it loads in transformers.

    Tensors keep their dtype; the router takes that of the embedding. Memory holds no more than the largest
    tensor twice, but for the logit check, which holds both models.

    Args:
        dense_dir: a Llama or a dense Qwen3 as `save_pretrained` writes it.
        checkpoint: the folder to write; it must not exist.
        upcycling: the experts.
        check_logits: compare our logits with those of the dense model in transformers at the end. With noise
            the difference is found but not judged.
        note: told what was found.

    Returns:
        What the logit check found; None where it was not asked for.

    Raises:
        InputError: the folder cannot be upcycled so, or the logits differ; nothing was written.
    """
    refuse_existing(checkpoint)
    folder = HfFolder(dense_dir)
    family = dense_family_of(folder.config)
    size = _feed_forward_size(folder)
    upcycling.check(size)
    experts = Experts(upcycling.num_experts, upcycling.top_k, size // upcycling.slices)
    config = family.moe_config(folder.config, experts)
    model = family.becomes.model_of(config)
    shapes = tensor_shapes(run_config(model, precision="fp32"))
    parts = bind(family.becomes.table(model), shapes, family.becomes.name)
    seen = _Upcycled(folder, family, parts, upcycling, router_std=model.init_std)
    check_tensors(folder, seen.dense_shapes, family.tied_copies(folder.config))
    note(
        f"{dense_dir}: {family.name}, {len(folder.tensors):,} tensors; each feed-forward becomes "
        f"{experts.num_experts} experts of {experts.hidden_size}, {experts.top_k} a token: "
        f"{family.becomes.name}"
    )
    incoming = Incoming(
        family=family.becomes,
        config=config,
        model=model,
        parts=parts,
        dtypes=seen.dtypes(),
        copies=(),
        text_files=text_files_of(dense_dir),
        read=seen.read,
    )
    allowed = math.inf if upcycling.noise else TOLERANCE

    def check(written: Path) -> LogitCheck | None:
        return compare_logits(dense_dir, written, model, tolerance=allowed) if check_logits else None

    return write_checkpoint(checkpoint, incoming, check)


def _feed_forward_size(folder: HfFolder) -> int:
    size = need(folder.config, "intermediate_size")
    if not isinstance(size, int) or size < 1:
        raise InputError(f"config.json: intermediate_size={size!r} is no size")
    return size


class _Upcycled:
    """A dense folder, seen as one of the family that it becomes."""

    def __init__(
        self,
        folder: HfFolder,
        family: DenseFamily,
        parts: Sequence[Part],
        upcycling: Upcycling,
        *,
        router_std: float,
    ) -> None:
        self._folder, self._upcycling, self._router_std = folder, upcycling, router_std
        self._origins: dict[str, _Origin] = {}
        self._routers: dict[str, Shape] = {}
        for name, shape in (named for part in parts for named in part.theirs):
            expert = family.expert.fullmatch(name)
            if family.router.fullmatch(name):
                self._routers[name] = shape
            elif expert:
                layer, number, matrix = expert.groups()
                dense = f"{layer}.mlp.{family.matrices[matrix]}.weight"
                self._origins[name] = _slice_of(dense, int(number), shape, upcycling.slices)
            else:
                self._origins[name] = _Origin(name, shape)

    @property
    def dense_shapes(self) -> dict[str, Shape]:
        """Of every tensor that the dense folder must have."""
        return {origin.dense: origin.shape for origin in self._origins.values()}

    def dtypes(self) -> dict[str, str]:
        """Of every tensor; only of a folder that has what it must."""
        dense = {name: info.dtype for name, info in self._folder.tensors.items()}
        routers = dict.fromkeys(self._routers, dense[_EMBEDDING])
        return routers | {name: dense[origin.dense] for name, origin in self._origins.items()}

    def read(self, name: str) -> Tensor:
        """One tensor; a router in fp32."""
        if name in self._routers:
            return _router(name, self._routers[name], self._upcycling, std=self._router_std)
        origin = self._origins[name]
        tensor = self._folder.read(origin.dense, origin.region)
        if origin.region is None:
            return tensor
        return _with_noise(name, tensor.mul_(origin.factor), self._upcycling)


def _slice_of(dense: str, expert: int, shape: Shape, slices: int) -> _Origin:
    """Hidden units of a feed-forward are rows of gate and up, and columns of down."""
    rows, columns = shape
    number = expert % slices
    if dense.endswith("down_proj.weight"):
        cut = slice(number * columns, (number + 1) * columns)
        return _Origin(dense, (rows, slices * columns), (slice(None), cut), factor=slices)
    return _Origin(dense, (slices * rows, columns), (slice(number * rows, (number + 1) * rows), slice(None)))


def _router(name: str, shape: Shape, upcycling: Upcycling, *, std: float) -> Tensor:
    """One random row for each copy of the feed-forward, repeated for its slices."""
    copies = (shape[0] // upcycling.slices, *shape[1:])
    rows = seeded_normal(name, copies, (0,) * len(copies), copies, upcycling.seed)
    return (rows * std).repeat_interleave(upcycling.slices, dim=0)


def _with_noise(name: str, tensor: Tensor, upcycling: Upcycling) -> Tensor:
    if upcycling.noise == 0:
        return tensor
    shape = tuple(tensor.shape)
    wide = tensor.float()
    noise = seeded_normal(name, shape, (0,) * len(shape), shape, upcycling.seed)
    noise *= upcycling.noise * float(wide.std())
    return noise.add_(wide).to(tensor.dtype)
