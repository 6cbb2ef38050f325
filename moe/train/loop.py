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
from moe.metering.throughput import Pace, StepClock
from moe.train.folder import Spent
from moe.train.job_energy import JobEnergy
from moe.train.schedule import global_batch, learning_rate
from moe.train.stop import StopRequest


@dataclass
class Progress:
    """Totals of a run over all its starts; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    energy_j: float = 0.0
    useful_j: float = 0.0  # of the steps up to this one, each counted once; no evaluation, no checkpoint
    node_j: float = 0.0  # from instruments of whole machines; NaN without them
    loss_first: float = math.nan
    loss_last: float = math.nan
    heldout_loss: float = math.nan
    heldout_bits_per_byte: float = math.nan

    def charge(self, spent: Spent) -> None:
        """Count what all starts so far took, steps that will be done again included.

        A figure that is unknown on either side stays so.
        """
        self.energy_j = _larger(self.energy_j, spent.energy_j)
        self.node_j = _larger(self.node_j, spent.node_j)
        self.wall_s = max(self.wall_s, spent.wall_s)


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
        self._node_base_j = progress.node_j
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
            samples = global_batch(progress.step, config.train)
            self.engine.num_microbatches = self._num_microbatches(len(samples))
            result = self.engine.train_step(self._batches(self.train_set, samples), lr)
            tokens = len(samples) * config.data.seq_length
            self._advance(result, tokens)
            record = self._record(result, lr, clock.tick(tokens))
            if self._due(config.train.eval_interval):
                record |= self._evaluate()
            self._log(record, result)
            stopping = self.stop.agreed(self.engine.torch_device)
            if stopping or self._due(config.checkpoint.interval):
                self._save()
                self._read_energy()
            if stopping:
                break
        return progress.step >= config.train.steps

    def _due(self, interval: int) -> bool:
        step = self.progress.step
        return step == self.config.train.steps or (interval > 0 and step % interval == 0)

    def _advance(self, result: StepResult, tokens: int) -> None:
        progress = self.progress
        progress.step += 1
        progress.tokens += tokens
        progress.loss_last = result.loss
        if progress.step == 1:
            progress.loss_first = result.loss

    def _read_energy(self) -> None:
        self.progress.energy_j = self._energy_base_j + self.energy.read_j()
        self.progress.node_j = self._node_base_j + self.energy.node_j
        self.progress.wall_s = self._wall_base_s + time.monotonic() - self._started_s

    def _record(self, result: StepResult, lr: float, pace: Pace) -> dict[str, Any]:
        progress = self.progress
        before_j, before_s = self._logged
        step_began_j = progress.energy_j  # as last read: after the evaluation or checkpoint before the step
        self._read_energy()
        progress.useful_j += progress.energy_j - step_began_j
        self._logged = (progress.energy_j, progress.wall_s)
        elapsed_s = max(progress.wall_s - before_s, 1e-9)
        metered = math.isfinite(progress.energy_j)
        return {
            "step": progress.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "tokens_per_s": pace.tokens_per_s,
            "lr": lr,
            "expert_load_max_over_mean": router_stats(result.counts_LE.numpy()).load_max_over_mean,
            **energy_record(progress, self.energy),
            "power_w": (progress.energy_j - before_j) / elapsed_s if metered else None,
            "balance_loss": result.balance_loss,
            "z_loss": result.z_loss,
            **({"mtp_loss": result.mtp_loss} if self.config.model.mtp_layers else {}),
            **({"max_attention_logit": result.max_attention_logit} if self.config.optim.qk_clip else {}),
        }

    def _log(self, record: dict[str, Any], result: StepResult) -> None:
        self._counts_LE = self._counts_LE + result.counts_LE
        if self.loads is not None and self._due(self.config.train.log_interval):
            self.loads.write({"step": record["step"], "counts": self._counts_LE.tolist()})
            self._counts_LE = torch.zeros(1, dtype=torch.int64)
        for sink in self.sinks:
            sink.log(record)

    # ---- data ---------------------------------------------------------------------------------------------

    def _num_microbatches(self, batch_size: int) -> int:
        micro, dp = self.config.train.micro_batch_size, self.engine.layout.dp
        return num_microbatches(global_batch_size=batch_size, micro_batch_size=micro, dp_size=dp)

    def _batches(self, dataset: TokenDataset, samples: range) -> Iterator[Batch]:
        for microbatch in range(self._num_microbatches(len(samples))):
            own = microbatch_indices(
                0,
                microbatch,
                global_batch_size=len(samples),
                micro_batch_size=self.config.train.micro_batch_size,
                dp_rank=self.engine.dp_rank,
                dp_size=self.engine.layout.dp,
            )
            yield batch_for(dataset, samples[own.start : own.stop])

    def _evaluate(self) -> dict[str, float]:
        sequences = self.config.train.eval_sequences
        batches = self._batches(self.heldout_set, range(sequences))
        result = self.engine.evaluate(batches, self._num_microbatches(sequences), self.token_bytes_V)
        self.progress.heldout_loss = result.nll_nats / result.tokens
        self.progress.heldout_bits_per_byte = bits_per_byte(result)
        self._read_energy()
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


def energy_record(progress: Progress, energy: JobEnergy) -> dict[str, Any]:
    """What a record of metrics.jsonl and of energy.jsonl says about energy; see there."""
    validity = energy.validity if math.isfinite(progress.energy_j) else "invalid"
    quotable = progress.energy_j > 0 and validity != "invalid"
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "wall_s": progress.wall_s,
        "energy_j": _finite(progress.energy_j),
        "useful_j": _finite(progress.useful_j),
        "tokens_per_j": progress.tokens / progress.energy_j if quotable else None,
        "energy_source": energy.source,
        "energy_boundary": energy.boundary,
        "energy_validity": validity,
        **({"node_j": _finite(progress.node_j)} if math.isfinite(energy.node_j) else {}),
        **({"counter_step_j": _finite(energy.step_j)} if energy.step_j else {}),
        **({"node_counter_step_j": _finite(energy.node_step_j)} if energy.node_step_j else {}),
    }


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def progress_from(state: dict[str, Any]) -> Progress:
    """The totals that a checkpoint's state holds; those that an older version did not keep are unknown."""
    values: dict[str, Any] = {k: math.nan if v is None else v for k, v in state["progress"].items()}
    return Progress(**{"useful_j": math.nan, "node_j": math.nan} | values)
