"""The training loop: read, step, meter, evaluate, checkpoint, in that order, over any engine."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe.checkpoint.save import save_checkpoint
from moe.config.schema import RunConfig
from moe.data.dataset import TokenDataset, batch_for
from moe.data.sampler import microbatch_indices, num_microbatches
from moe.engine.base import Batch, Engine, EvalResult, StepResult
from moe.metering.jsonl import StepLog
from moe.metering.router_stats import router_stats
from moe.metering.sinks import Sink
from moe.metering.throughput import StepClock
from moe.train.job_energy import JobEnergy
from moe.train.schedule import learning_rate
from moe.train.stop import StopRequest


@dataclass
class Progress:
    """Totals of a run over all its starts; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    energy_j: float = 0.0
    loss_first: float = math.nan
    loss_last: float = math.nan
    heldout_loss: float = math.nan
    heldout_bits_per_byte: float = math.nan


class Loop:
    """Takes an engine from step to step. Every rank runs the same loop; only rank 0 has sinks."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        engine: Engine,
        *,
        datasets: tuple[TokenDataset, TokenDataset],
        token_bytes_V: torch.Tensor,
        energy: JobEnergy,
        sinks: Sequence[Sink],
        loads: StepLog | None,
        progress: Progress,
        stop: StopRequest,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.engine = engine
        self.train_set, self.heldout_set = datasets
        self.token_bytes_V = token_bytes_V
        self.energy = energy
        self.sinks = sinks
        self.progress = progress
        self.loads = loads
        self.stop = stop
        self._counts_LE = torch.zeros(1, dtype=torch.int64)  # since the last line of expert_load.jsonl
        self._energy_base_j = progress.energy_j
        self._wall_base_s = progress.wall_s

    def run(self) -> bool:
        """Train to train.steps; evaluate and save at the configured intervals and at the end.

        Returns:
            Whether that end was reached; False if a stop was requested, which also saves.

        Raises:
            TrainingDivergedError: the loss or the gradient norm is not finite.
            InputError: a checkpoint cannot be written.
        """
        config, progress = self.config, self.progress
        self._started_s = time.monotonic()
        self._read_energy()
        self._logged = (progress.energy_j, progress.wall_s)
        clock = StepClock(config.train.steps - progress.step)
        while progress.step < config.train.steps:
            lr = learning_rate(progress.step, config.optim, config.train.steps)
            result = self.engine.train_step(self._train_batches(progress.step), lr)
            self._advance(result)
            record = self._record(result, lr, clock)
            if self._due(config.train.eval_interval):
                record |= self._evaluate()
            self._log(record, result)
            stopping = self.stop.agreed(self.engine.torch_device)
            if stopping or self._due(config.checkpoint.interval):
                self._save()
            if stopping:
                break
        self._read_energy()  # the last checkpoint belongs to the run
        return progress.step >= config.train.steps

    def _due(self, interval: int) -> bool:
        step = self.progress.step
        return step == self.config.train.steps or (interval > 0 and step % interval == 0)

    def _advance(self, result: StepResult) -> None:
        progress, train = self.progress, self.config.train
        progress.step += 1
        progress.tokens += train.global_batch_size * self.config.data.seq_length
        progress.loss_last = result.loss
        if progress.step == 1:
            progress.loss_first = result.loss

    def _read_energy(self) -> None:
        self.progress.energy_j = self._energy_base_j + self.energy.read_j()
        self.progress.wall_s = self._wall_base_s + time.monotonic() - self._started_s

    def _record(self, result: StepResult, lr: float, clock: StepClock) -> dict[str, Any]:
        progress = self.progress
        before_j, before_s = self._logged
        self._read_energy()
        self._logged = (progress.energy_j, progress.wall_s)
        elapsed_s = max(progress.wall_s - before_s, 1e-9)
        metered = math.isfinite(progress.energy_j)
        pace = clock.tick(self.config.train.global_batch_size * self.config.data.seq_length)
        return {
            "step": progress.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "tokens": progress.tokens,
            "tokens_per_s": pace.tokens_per_s,
            "lr": lr,
            "expert_load_max_over_mean": router_stats(result.counts_LE.numpy()).load_max_over_mean,
            "energy_j": progress.energy_j if metered else None,
            "power_w": (progress.energy_j - before_j) / elapsed_s if metered else None,
            "wall_s": progress.wall_s,
            "balance_loss": result.balance_loss,
            "z_loss": result.z_loss,
            **({"mtp_loss": result.mtp_loss} if self.config.model.mtp_layers else {}),
        }

    def _log(self, record: dict[str, Any], result: StepResult) -> None:
        self._counts_LE = self._counts_LE + result.counts_LE
        if self.loads is not None and self._due(self.config.train.log_interval):
            self.loads.write({"step": record["step"], "counts": self._counts_LE.tolist()})
            self._counts_LE = torch.zeros(1, dtype=torch.int64)
        for sink in self.sinks:
            sink.log(record)

    # ---- data ---------------------------------------------------------------------------------------------

    def _train_batches(self, step: int) -> Iterator[Batch]:
        return self._batches(self.train_set, step, self.config.train.global_batch_size)

    def _batches(self, dataset: TokenDataset, step: int, batch_size: int) -> Iterator[Batch]:
        micro, dp = self.config.train.micro_batch_size, self.engine.layout.dp
        count = num_microbatches(global_batch_size=batch_size, micro_batch_size=micro, dp_size=dp)
        for microbatch in range(count):
            indices = microbatch_indices(
                step,
                microbatch,
                global_batch_size=batch_size,
                micro_batch_size=micro,
                dp_rank=self.engine.dp_rank,
                dp_size=dp,
            )
            yield batch_for(dataset, indices)

    def _evaluate(self) -> dict[str, float]:
        sequences = self.config.train.eval_sequences
        num_batches = num_microbatches(
            global_batch_size=sequences,
            micro_batch_size=self.config.train.micro_batch_size,
            dp_size=self.engine.layout.dp,
        )
        batches = self._batches(self.heldout_set, 0, sequences)
        result = self.engine.evaluate(batches, num_batches, self.token_bytes_V)
        self.progress.heldout_loss = result.nll_nats / result.tokens
        self.progress.heldout_bits_per_byte = bits_per_byte(result)
        return {
            "heldout_loss": self.progress.heldout_loss,
            "heldout_bits_per_byte": self.progress.heldout_bits_per_byte,
        }

    # ---- checkpoints --------------------------------------------------------------------------------------

    def _save(self) -> None:
        self._read_energy()
        state: dict[str, Any] = {
            "layout": self.engine.layout.as_dict(),
            "world_size": self.engine.world_size,
            "engine": self.config.engine.name,
            "model": self.config.model.model_dump(mode="json"),
            "progress": {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in vars(self.progress).items()
            },
        }
        root = self.run_dir / "checkpoints"
        save_checkpoint(self.engine, root, self.progress.step, state, keep=self.config.checkpoint.keep)


def bits_per_byte(result: EvalResult) -> float:
    """Held-out loss in bits per UTF-8 byte of text, which does not depend on the tokenizer."""
    return result.nll_nats / math.log(2) / result.text_bytes if result.text_bytes else math.nan


def progress_from(state: dict[str, Any]) -> Progress:
    """The totals that a checkpoint's state holds."""
    values: dict[str, Any] = {k: math.nan if v is None else v for k, v in state["progress"].items()}
    return Progress(**values)
