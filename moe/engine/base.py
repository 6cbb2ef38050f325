"""What the training loop asks of an engine, whichever library carries it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moe.errors import MoeError

# tokens_BS, labels_BS, loss_mask_BS, position_ids_BS of one micro-batch
Batch = Mapping[str, Tensor]


class TrainingDivergedError(MoeError):
    """The loss or the gradient norm is not a finite number."""

    on_all_ranks = True


@dataclass(frozen=True)
class Layout:
    """Ranks along each dimension; dp is what tp, pp and cp leave of the world."""

    tp: int
    pp: int
    ep: int
    cp: int
    dp: int
    etp: int = 1

    def as_dict(self) -> dict[str, int]:
        """Plain dict for reports and manifests."""
        return asdict(self)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, equal on every rank."""

    loss: float  # nats per token, mean over the global batch
    balance_loss: float
    z_loss: float
    grad_norm: float
    counts_LE: Tensor  # int64, CPU: tokens that chose each expert, one row an expert layer
    mtp_loss: float = 0.0  # nats per token, mean over the predictions of further tokens; without coefficient
    max_attention_logit: float | None = None  # of all heads, before clipping; None without QK-clip


@dataclass(frozen=True)
class EvalResult:
    """Summed over all evaluated tokens, equal on every rank."""

    nll_nats: float
    tokens: int
    text_bytes: int


class Engine(Protocol):
    """Trains one model over all ranks of the job. Every method is collective."""

    layout: Layout
    rank: int
    world_size: int
    dp_rank: int
    device: str  # in words
    torch_device: torch.device
    params_total: int
    checkpoint_bytes: int
    num_microbatches: int  # of the next step, on this rank; a batch that grows sets it between steps

    def train_step(self, batches: Iterator[Batch], lr: float) -> StepResult:
        """Forward, backward and update over this rank's micro-batches of a global batch."""
        ...

    def evaluate(self, batches: Iterator[Batch], num_batches: int, token_bytes_V: Tensor) -> EvalResult:
        """Sum the loss of this rank's held-out batches and all other ranks'; no update."""
        ...

    def save_shards(self, directory: Path) -> None:
        """Write weights, moments and expert biases; every rank writes its share."""
        ...

    def shard_files(self, directory: Path) -> list[str]:
        """Names of the files that save_shards wrote on this rank."""
        ...

    def load_shards(self, directory: Path, step: int) -> None:
        """Read what save_shards wrote, in whatever layout; `step` is the steps already taken."""
        ...

    def load_weights(self, directory: Path) -> None:
        """Read weights and expert biases, in whatever layout and precision; moments stay as they are."""
        ...

    def rng_state(self) -> dict[str, Tensor]:
        """Random generator states of this rank, uint8; one is named `cuda` on CUDA and only there."""
        ...

    def set_rng_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what rng_state gave on the same kind of device."""
        ...

    def close(self) -> None:
        """Leave the process groups and undo every adaptation."""
        ...
