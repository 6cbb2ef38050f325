"""Times of the forward and backward passes of each pipeline stage of a run, for `moe energy clock-plan`.

torchrun --nproc-per-node N -m benchmarks.measure_stage_times RUN_DIR     writes RUN_DIR/stage_times.json

Trains a few steps of the run's recipe from the start, in its layout, without touching its checkpoints. Each
pass waits for its GPU before and after, so the times are of work alone, transfers between stages not
included; training itself is slower for it, and its speed is not reported.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules

from benchmarks.harness import device_name, progress, write_json
from moe.config import load_config
from moe.energy.stage_times import STAGE_TIMES_FILE
from moe.energy.training_leg import train_watched
from moe.errors import InputError, MoeError
from moe.quiet import quiet_third_party
from moe.train.folder import CONFIG_FILE

WARM_UP_STEPS = 2
MEASURED_STEPS = 5


class PassTimer:
    """Seconds of each call of a function of Megatron's schedules."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            _wait()
            begin_s = time.perf_counter()
            result = function(*arguments, **options)
            _wait()
            self.seconds.append(time.perf_counter() - begin_s)
            return result

        return timed

    def median_step_s(self, passes_a_step: int) -> float:
        """Of the steps after the warm-up, each the sum of its passes: chunks may be of different lengths."""
        begins = range(passes_a_step * WARM_UP_STEPS, len(self.seconds), passes_a_step)
        return statistics.median(sum(self.seconds[begin : begin + passes_a_step]) for begin in begins)


class StepCount:
    """A watch that stops after some steps."""

    def __init__(self) -> None:
        self.steps = 0

    def log(self, record: Mapping[str, Any]) -> None:
        """Count a step."""
        self.steps += 1

    @property
    def done(self) -> bool:
        """Whether there were enough."""
        return self.steps >= WARM_UP_STEPS + MEASURED_STEPS


def main() -> int:
    """Parse argv, measure, write; 0 unless the run cannot be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    args = parser.parse_args()
    quiet_third_party()
    try:
        measure(args.run_dir)
    except MoeError as error:
        progress(f"error: {error}")
        return error.exit_code
    return 0


def measure(run_dir: Path) -> None:
    """Train a few steps and write the times of all stages; collective.

    Raises:
        InputError: the run has one stage only.
    """
    config = load_config(run_dir / CONFIG_FILE, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    # One step more than is measured, for the last one evaluates; no other may, its passes would count.
    steps = max(config.train.steps, WARM_UP_STEPS + MEASURED_STEPS + 1)
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"steps": steps, "eval_interval": 0})}
    )
    if config.parallel.pp < 2:
        raise InputError(
            f"{run_dir} has parallel.pp={config.parallel.pp}: only pipelines have stages that wait"
        )
    watch = StepCount()
    forward, backward = PassTimer(), PassTimer()
    found: list[dict[str, Any]] = []

    def gather() -> None:
        parallel = config.parallel
        dp = dist.get_world_size() // (parallel.tp * parallel.pp * parallel.cp)
        microbatches = config.train.global_batch_size // (config.train.micro_batch_size * dp)
        passes = microbatches * parallel.vpp
        # A pass is one chunk of layers; a micro-batch passes through all chunks of a stage.
        own = (
            parallel_state.get_pipeline_model_parallel_rank(),
            forward.median_step_s(passes) / microbatches,
            backward.median_step_s(passes) / microbatches,
        )
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        found.append(
            stage_times(everyone, parallel.pp) | {"num_microbatches": microbatches, "vpp": parallel.vpp}
        )

    with (
        patch.object(schedules, "forward_step", forward.around(schedules.forward_step)),
        patch.object(schedules, "backward_step", backward.around(schedules.backward_step)),
    ):
        trained = train_watched(config, lambda _: watch, progress, at_end=gather)
    if trained is not None:
        device = "cuda" if torch.cuda.is_available() and trained.device != "cpu" else "cpu"
        write_json(run_dir / STAGE_TIMES_FILE, found[0] | {"device": device_name(device)})
        progress(f"{run_dir / STAGE_TIMES_FILE}")


def stage_times(ranks: list[tuple[int, float, float]], pp: int) -> dict[str, list[float]]:
    """Of each stage the time of its slowest rank, for which the others wait."""
    return {
        name: [max(rank[index] for rank in ranks if rank[0] == stage) for stage in range(pp)]
        for name, index in (("forward_s", 1), ("backward_s", 2))
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
