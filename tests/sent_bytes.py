"""What a rank sends: every collective that it enters, counted where torch hands it to the backend.

Bytes are those of a ring, as in moe/planner/bytes_sent.py: (n - 1) / n of the whole tensor for an all-gather
or a reduce-scatter, twice that for an all-reduce, the rows for other ranks of an all-to-all, the tensor of a
send.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# By the description that Megatron gives a process group; all others are sums over the job.
CAUSES = {
    "EXPERT_MODEL_PARALLEL_GROUP": "expert",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert",
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "CONTEXT_PARALLEL_GROUP": "context",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "EMBEDDING_GROUP": "pipeline",
    "DATA_PARALLEL_GROUP_WITH_CP": "data",
    "EXPERT_DATA_PARALLEL_GROUP": "data",
}


def _ring(group: dist.ProcessGroup, *tensors: Tensor) -> float:
    """Of an all-gather or reduce-scatter of these whole tensors."""
    return sum(tensor.nbytes for tensor in tensors) * (group.size() - 1) / group.size()


def _all_to_all(group: dist.ProcessGroup, given: Tensor, send_rows: Sequence[int]) -> float:
    rows = list(send_rows) or [given.shape[0] // group.size()] * group.size()
    return (sum(rows) - rows[group.rank()]) * given[0].nbytes if given.shape[0] else 0.0


# From the arguments of an operator: the place of the group, and what is sent in it.
_Sent = Callable[[dist.ProcessGroup, Any], float]
_OPERATORS: dict[str, tuple[int, _Sent]] = {
    "allreduce_": (1, lambda group, args: 2 * _ring(group, *args[0])),
    "allreduce_coalesced_": (1, lambda group, args: 2 * _ring(group, *args[0])),
    "allgather_": (2, lambda group, args: sum(_ring(group, *whole) for whole in args[0])),
    "_allgather_base_": (2, lambda group, args: _ring(group, args[0])),
    "allgather_into_tensor_coalesced_": (2, lambda group, args: _ring(group, *args[0])),
    "_reduce_scatter_base_": (2, lambda group, args: _ring(group, args[1])),
    "reduce_scatter_tensor_coalesced_": (2, lambda group, args: _ring(group, *args[1])),
    "alltoall_base_": (2, lambda group, args: _all_to_all(group, args[1], args[4])),
    "send": (1, lambda _group, args: float(sum(tensor.nbytes for tensor in args[0]))),
    "recv_": (1, lambda _group, _args: 0.0),
    "barrier": (1, lambda _group, _args: 0.0),
}


class SentBytes(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        by_cause: Bytes that this rank sent, by the names of CAUSES.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_cause: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if "c10d" in namespace and not name.startswith("wait"):
            place, sent = _OPERATORS[name]  # a collective that is not listed fails the test
            group = dist.ProcessGroup.unbox(args[place])
            self.by_cause[CAUSES.get(group.group_desc, "control")] += sent(group, args)
        return func(*args, **(kwargs or {}))
