"""Real training without a run folder: the engine, data, meter and loop of `moe train`, for measurements.

Nothing is written: no checkpoint, no log. A watch sees every step, as a sink of the loop does, and stops the
training when it has what it wants.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe.config.schema import RunConfig
from moe.counts.counts import flops_per_token, params_active
from moe.counts.shape import shape_of
from moe.data.tokenizer import Tokenizer
from moe.energy.watch import Machines, Watch
from moe.engine.base import Engine
from moe.metering.report import Energy
from moe.ranks import on_every_rank
from moe.train.inputs import find_inputs
from moe.train.job_energy import JobEnergy
from moe.train.loop import Loop, Progress
from moe.train.run import build_datasets, make_engine, seed_everything
from moe.train.stop import StopRequest

Note = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """What trained, and how its joules were obtained.

    Attributes:
        params_total: Counted on the model.
        params_active: That a token uses, embeddings included.
        flops_per_token: By the convention of moe.counts.counts.
        layout: Group sizes.
        device: In words.
        ranks: Of the job.
        machines: Where.
        energy: Source, boundary and total of the whole leg.
    """

    params_total: int
    params_active: int
    flops_per_token: int
    layout: dict[str, int]
    device: str
    ranks: int
    machines: Machines
    energy: Energy


def train_watched(
    config: RunConfig,
    make_watch: Callable[[Machines], Watch],
    note: Note,
    *,
    at_end: Callable[[], None] = lambda: None,
    before_close: Callable[[], None] = lambda: None,
) -> Trained | None:
    """Train until the watch is done or train.steps are over; collective.

    Args:
        config: Of the run; its folder is not touched.
        make_watch: Called on rank 0 once the engine is up.
        note: Takes messages for a person.
        at_end: Called on every rank while they still reach each other.
        before_close: Called on every rank however the training ended, before the engine closes.

    Returns:
        On rank 0 what trained; None on the others.

    Raises:
        MoeError: What would have ended `moe train` as well.
    """
    seed_everything(config)
    engine = make_engine(config)
    try:
        trained = _train(engine, config, make_watch, note)
        at_end()
        return trained
    finally:
        try:
            before_close()
        finally:
            engine.close()


def _train(
    engine: Engine, config: RunConfig, make_watch: Callable[[Machines], Watch], note: Note
) -> Trained | None:
    machines = _machines(engine)
    inputs = find_inputs(config, note)
    tokenizer = Tokenizer.load(inputs.tokenizer)
    energy = JobEnergy(config.energy, engine.torch_device, note)
    stop = StopRequest()
    sinks = [_Stopper(make_watch(machines), stop)] if engine.rank == 0 else []
    try:
        loop = _UnsavedLoop(
            config,
            Path(),
            engine,
            datasets=build_datasets(config, inputs, tokenizer),
            token_bytes_V=torch.from_numpy(tokenizer.token_bytes()),
            energy=energy,
            sinks=sinks,
            loads=None,
            progress=Progress(),
            stop=stop,
        )
        loop.run()
        report = energy.report(loop.progress.energy_j)
    finally:
        energy.close()
    shape = shape_of(config.model)
    trained = Trained(
        params_total=engine.params_total,
        params_active=params_active(shape),
        flops_per_token=flops_per_token(shape, config.data.seq_length),
        layout=engine.layout.as_dict(),
        device=engine.device,
        ranks=engine.world_size,
        machines=machines,
        energy=report,
    )
    return trained if engine.rank == 0 else None


class _UnsavedLoop(Loop):
    def _save(self) -> None:
        """Write no checkpoint: a window of steps has none, and a campaign's figure has all of them."""


class _Stopper:
    """Asks the loop to stop when a watch is done."""

    def __init__(self, watch: Watch, stop: StopRequest) -> None:
        self._watch = watch
        self._stop = stop

    def start(self, config: Mapping[str, Any], total_steps: int) -> None:
        """The loop never calls it; whoever writes a run folder does."""

    def log(self, record: Mapping[str, Any]) -> None:
        self._watch.log(record)
        self._stop.requested = self._watch.done

    def finish(self, report: object) -> None:
        """Likewise."""


def _machines(engine: Engine) -> Machines:
    device = engine.torch_device
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""
    host = socket.gethostname()
    members = on_every_rank(lambda: (host, uuid))
    gpus = dict.fromkeys((host, uuid) for host, uuid in members if uuid)
    return Machines(
        hosts=tuple(dict.fromkeys(host for host, _ in members)),
        gpu_uuids=tuple(uuid for _, uuid in gpus),
        own_gpu_uuids=tuple(uuid for host, uuid in gpus if host == members[0][0]),
    )
