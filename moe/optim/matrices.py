"""Which parameters are matrices, and where several lie in one.

Fused projections are several matrices: queries, keys and values; gate and up. Each is orthogonalised by
itself, as its paper writes it, so that fusion changes no update. Embedding, head, norms and biases have
AdamW, as in Moonlight (arXiv 2502.16982), and so has the router, whose rows are one choice each.

Shapes: b matrices of experts or none, N rows, M columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe.config.schema import AttentionSection, ModelSection
from moe.optim.orthogonal import orthogonalize, update_scale

_WHOLE = ("linear_proj.weight", "linear_fc2.weight", "linear_q_down.weight", "eh_proj.weight", "w_down_eDF")
_GATE_UP = ("linear_fc1.weight", "w_gate_up_eGD")


@dataclass(frozen=True)
class Matrices:
    """What one rank holds of the matrices in a parameter.

    Attributes:
        shape: Of the parameter, with a leading dimension for experts.
        segments: Rows of one matrix after another, again and again: (2 d, d, d) is two heads of queries,
            one of keys, one of values for each group.
        split_dim: -2 or -1 where ranks share out rows or columns; None: each has all.
    """

    shape: tuple[int, ...]
    segments: tuple[int, ...]
    split_dim: int | None = None

    def update(self, x_bNM: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
        """This rank's part of the orthogonalised matrices, scaled; collective over the group if split.

        Args:
            x_bNM: momentum, of the parameter's shape; of experts, any of them.
            tp_group: tensor-parallel ranks, of experts those that split each one.
        """
        return self._joined([self._update_one(part, tp_group) for part in self._apart(x_bNM)])

    def _update_one(self, part_bNM: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
        if self.split_dim is None or tp_group is None or tp_group.size() == 1:
            return orthogonalize(part_bNM) * update_scale(*part_bNM.shape[-2:])
        whole_bNM = _gathered(part_bNM, tp_group, self.split_dim)
        update_bNM = orthogonalize(whole_bNM) * update_scale(*whole_bNM.shape[-2:])
        return update_bNM.chunk(tp_group.size(), dim=self.split_dim)[tp_group.rank()]

    def _apart(self, x_bNM: Tensor) -> list[Tensor]:
        if len(self.segments) == 1:
            return [x_bNM]
        turns = x_bNM.unflatten(-2, (-1, sum(self.segments)))
        return [part.flatten(-3, -2) for part in turns.split(self.segments, dim=-2)]

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        if len(self.segments) == 1:
            return parts[0]
        turns = [part.unflatten(-2, (-1, rows)) for part, rows in zip(parts, self.segments, strict=True)]
        return torch.cat(turns, dim=-2).flatten(-3, -2)


def matrices_of(name: str, parameter: Tensor, model: ModelSection) -> Matrices | None:
    """The matrices in a parameter of the model, or None for what has AdamW.

    Args:
        name: Of the parameter.
        parameter: This rank's part; marked by Megatron where tensor-parallel ranks have others.
        model: Sizes.
    """
    shape = tuple(parameter.shape)
    if name.endswith(_WHOLE):
        segments: tuple[int, ...] = (shape[-2],)
    elif name.endswith(_GATE_UP):
        segments = (shape[-2] // 2, shape[-2] // 2)
    else:
        segments = _attention_segments(name, model.attention)
    if not segments:
        return None
    # Experts bear Megatron's mark in any case; where they are whole it names the dimension of experts.
    marked = getattr(parameter, "tensor_model_parallel", False)
    split_dim = parameter.partition_dim - len(shape) if marked else None  # type: ignore[attr-defined]
    return Matrices(shape, segments, split_dim if split_dim in (-2, -1) else None)


def _attention_segments(name: str, attention: AttentionSection) -> tuple[int, ...]:
    if name.endswith("linear_qkv.weight"):
        d = attention.head_dim
        return attention.num_heads // attention.query_groups * d, d, d
    if name.endswith("linear_q_up.weight"):
        return attention.qk_nope_head_dim, attention.qk_rope_head_dim
    if name.endswith("linear_kv_up.weight"):
        return attention.qk_nope_head_dim, attention.v_head_dim
    if name.endswith("linear_kv_down.weight"):
        return attention.kv_lora_rank, attention.qk_rope_head_dim
    return ()


def _gathered(part_bNM: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """The whole matrices of which each rank of a group has a part of the rows (-2) or columns (-1)."""
    parts = [torch.empty_like(part_bNM) for _ in range(group.size())]
    dist.all_gather(parts, part_bNM.contiguous(), group=group)
    return torch.cat(parts, dim=dim)
