"""A whole run, on every rank of the job: folders, data, engine, loop, report.

`train` starts one, `resume` continues one from its newest intact checkpoint.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from moe.checkpoint.load import (
    find_checkpoint,
    load_checkpoint,
    load_initial_weights,
    verify_together,
    written_on,
)
from moe.checkpoint.manifest import read_manifest
from moe.config.load import dump_config
from moe.config.schema import RunConfig
from moe.counts.counts import flops_per_token, params_active
from moe.counts.shape import shape_of
from moe.data.dataset import TokenDataset, build_gpt_datasets
from moe.data.tokenizer import Tokenizer
from moe.durable import write_atomically
from moe.engine.base import Engine
from moe.errors import InputError, MoeError
from moe.kernels.backend import choose_backend, load_driver
from moe.metering.console import ConsoleSink
from moe.metering.journal import EnergyJournal, Starts, read_journal, starts_of
from moe.metering.jsonl import EXPERT_LOAD_FILE, StepLog
from moe.metering.report import Campaign, Layout, Report, write_report
from moe.metering.sinks import JsonlSink, Sink, WandbSink
from moe.ranks import on_every_rank, on_rank0
from moe.train.folder import (
    CONFIG_FILE,
    REPORT_FILE,
    can_resume,
    check_tokenizer,
    log_start,
    refuse_existing,
    spent_before,
)
from moe.train.initial_weights import check_initial_weights
from moe.train.inputs import Inputs, find_inputs
from moe.train.job_energy import JobEnergy
from moe.train.loop import Loop, Progress, energy_record, progress_from
from moe.train.schedule import global_batch
from moe.train.stop import StopRequest, stopped

Note = Callable[[str], None]


@dataclass(frozen=True)
class RunOptions:
    """What a run is given beside its config."""

    run_dir: Path
    resume: bool
    note: Note  # messages for a person; of rank 0, and of the rank whose energy meter fails
    auto_resume: bool = False  # go on where there is a checkpoint, else begin, whatever the folder holds
    stop: StopRequest = field(default_factory=StopRequest)


def run_job(config: RunConfig, options: RunOptions) -> Report | None:
    """Train on every rank of the job; collective. Rank 0 returns the report.

    Raises:
        MoeError: its text names what was wrong; the same on every rank.
    """
    seed_everything(config)
    engine = make_engine(config)
    try:
        return _run_on(engine, config, options)
    finally:
        engine.close()


def _run_on(engine: Engine, config: RunConfig, options: RunOptions) -> Report | None:
    run_dir, note = options.run_dir, options.note
    kernels = on_every_rank(lambda: _choose_kernels(config, engine))[engine.rank]
    resume = on_rank0(lambda: _open_folder(config, options))
    if engine.rank == 0:
        note(_introduction(config, engine, run_dir, kernels))
    inputs = find_inputs(config, note)
    tokenizer = Tokenizer.load(inputs.tokenizer)
    if resume:
        on_rank0(lambda: check_tokenizer(run_dir, tokenizer.fingerprint))
    datasets = build_datasets(config, inputs, tokenizer)
    outputs = Outputs(note)
    # Before the checkpoint is read: what a restart costs belongs to the run.
    energy = JobEnergy(config.energy, engine.torch_device, outputs.say, run_dir=run_dir)
    try:
        progress = _restore(engine, run_dir, note) if resume else _begin(engine, config, options)
        if progress.step >= config.train.steps:
            if engine.rank == 0:
                note(f"the run has done its {config.train.steps} steps; give it more with train.steps=N")
            return None
        on_rank0(
            lambda: outputs.open(
                config,
                run_dir,
                energy=energy,
                progress=progress,
                world_size=engine.world_size,
                tokenizer=tokenizer.fingerprint,
            )
        )
        loop = Loop(
            config,
            run_dir,
            engine,
            datasets=datasets,
            token_bytes_V=torch.from_numpy(tokenizer.token_bytes()),
            energy=energy,
            sinks=outputs.sinks,
            loads=outputs.loads,
            progress=progress,
            stop=options.stop,
        )
        finished = loop.run()
        outputs.close_journal(energy_record(progress, energy))
        if finished:
            starts = on_rank0(lambda: starts_of(read_journal(run_dir)))
            outputs.report = make_report(config, engine, energy, progress=progress, starts=starts)
    finally:
        energy.close()
        outputs.close()
    on_rank0(lambda: outputs.write_report(run_dir) if finished else _raise(stopped(run_dir, progress.step)))
    return outputs.report if engine.rank == 0 else None


@dataclass
class Outputs:
    """What rank 0 writes during a run; empty on the other ranks."""

    note: Note
    console: ConsoleSink | None = None
    sinks: list[Sink] = field(default_factory=list)
    loads: StepLog | None = None
    journal: EnergyJournal | None = None
    report: Report | None = None

    def open(
        self,
        config: RunConfig,
        run_dir: Path,
        *,
        energy: JobEnergy,
        progress: Progress,
        world_size: int,
        tokenizer: str,
    ) -> None:
        """Open every file and tracker; the run's config is replaced only now that nothing else can fail.

        Raises:
            InputError: a log of an earlier start is damaged.
        """
        self.note(f"energy: {energy.description}")
        self.loads = StepLog(run_dir / EXPERT_LOAD_FILE, resume_step=progress.step)
        jsonl = JsonlSink(run_dir, resume_step=progress.step)
        self.console = _console(config, energy, progress)
        self.journal = EnergyJournal(run_dir)
        self.sinks = [self.console, jsonl, self.journal, _wandb(config, run_dir, self.say)]
        write_atomically(run_dir / CONFIG_FILE, dump_config(config))
        log_start(
            run_dir,
            step=progress.step,
            energy_j=progress.energy_j,
            wall_s=progress.wall_s,
            world_size=world_size,
            tokenizer=tokenizer,
        )
        size = {"gpus": energy.num_gpus, "machines": energy.num_machines}
        self.journal.open(energy_record(progress, energy) | size)
        for sink in self.sinks:
            sink.start(config.model_dump(mode="json"), config.train.steps)

    def say(self, text: str) -> None:
        """A message while the run goes on: above the bar where there is one."""
        (self.note if self.console is None else self.console.note)(text)

    def close_journal(self, record: dict[str, Any]) -> None:
        """Write what this start came to, its last checkpoint included."""
        if self.journal is not None:
            self.journal.end(record)

    def write_report(self, run_dir: Path) -> None:
        """Write report.json and the pictures."""
        assert self.report is not None
        write_report(run_dir / REPORT_FILE, self.report)
        self.note(f"report: {run_dir / REPORT_FILE}")
        from moe.metering.plots import plot_run

        for path in plot_run(run_dir):
            self.note(f"plot: {path}")

    def close(self) -> None:
        """Close files and trackers; without a report the run did not reach its end."""
        for sink in self.sinks:
            sink.finish(self.report)
        if self.loads is not None:
            self.loads.close()


def build_datasets(
    config: RunConfig, inputs: Inputs, tokenizer: Tokenizer
) -> tuple[TokenDataset, TokenDataset]:
    """Samples of all steps of the run, and those of an evaluation."""
    return build_gpt_datasets(
        train=inputs.train,
        heldout=inputs.heldout,
        seq_length=config.data.seq_length,
        train_samples=global_batch(config.train.steps, config.train).start,
        heldout_samples=config.train.eval_sequences,
        tokenizer=tokenizer,
        seed=config.run.seed,
        cache_dir=inputs.cache_dir / "indices",
    )


def _console(config: RunConfig, energy: JobEnergy, progress: Progress) -> ConsoleSink:
    return ConsoleSink(
        estimated=energy.estimated, log_interval=config.train.log_interval, done_steps=progress.step
    )


def _wandb(config: RunConfig, run_dir: Path, note: Note) -> WandbSink:
    tracking = config.tracking
    return WandbSink(
        run_dir, project=tracking.project, run_name=config.run.name, warn=note, mode=tracking.wandb
    )


def _choose_kernels(config: RunConfig, engine: Engine) -> str:
    try:
        kernels = choose_backend(config.engine.kernels, torch.empty(0, device=engine.torch_device))
        if kernels == "triton" and engine.torch_device.type == "cuda":
            load_driver()  # here, where what is missing can be named, and not within the first step
        return kernels
    except ValueError as error:
        raise InputError(f"engine.kernels={config.engine.kernels}: {error}") from error


def _introduction(config: RunConfig, engine: Engine, run_dir: Path, kernels: str) -> str:
    layout = " ".join(f"{name}={size}" for name, size in engine.layout.as_dict().items())
    model = config.model
    return (
        f"{run_dir}: {engine.params_total:,} parameters, {params_active(shape_of(model)):,} active, "
        f"{model.num_experts} experts top-{model.top_k}; {layout} on {engine.device}, {kernels} kernels"
    )


def make_engine(config: RunConfig) -> Engine:
    """The engine that the config names; the process becomes a rank of its job.

    Raises:
        InputError: what it needs of the machine or of a library is absent.
    """
    if config.engine.name == "deepspeed":
        from moe.engine.deepspeed_names import require_names

        require_names()
        from moe.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config)
    from moe.engine.megatron import MegatronEngine

    return MegatronEngine(config)


def seed_everything(config: RunConfig) -> None:
    """The global generators, and determinism where the config asks for it."""
    random.seed(config.run.seed)
    np.random.seed(config.run.seed)  # what libraries draw from the global generator
    torch.manual_seed(config.run.seed)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses determinism without it
    torch.use_deterministic_algorithms(config.run.deterministic)


def _open_folder(config: RunConfig, options: RunOptions) -> bool:
    """Whether the folder's run is continued; if not, it is made ready for a new one."""
    run_dir = options.run_dir
    if options.resume or (options.auto_resume and can_resume(run_dir, config)):
        return True
    if not options.auto_resume:
        refuse_existing(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / CONFIG_FILE, dump_config(config))
    return False


def _raise(error: MoeError) -> NoReturn:
    raise error


def _begin(engine: Engine, config: RunConfig, options: RunOptions) -> Progress:
    """A new run, from the weights that the config names, if any."""
    note = options.note
    source = config.train.init_from
    if source is not None:
        on_rank0(lambda: check_initial_weights(source, config.model))
        verify_together(source)
        load_initial_weights(engine, source)
        if engine.rank == 0:
            note(f"starting from the weights of {source}")
    # Of earlier starts that did not reach a checkpoint; nothing in a fresh folder.
    progress = Progress()
    progress.charge(on_rank0(lambda: spent_before(options.run_dir)))
    return progress


def _restore(engine: Engine, run_dir: Path, note: Note) -> Progress:
    checkpoint = find_checkpoint(run_dir / "checkpoints", note)
    written = read_manifest(checkpoint).state
    layout = written["layout"]
    assert isinstance(layout, dict)
    layout.setdefault("etp", 1)  # which early checkpoints do not name
    same_layout = layout == engine.layout.as_dict() and written["world_size"] == engine.world_size
    same_device = on_rank0(lambda: written_on(checkpoint)) == engine.torch_device.type
    manifest = load_checkpoint(engine, checkpoint, with_rng=same_layout and same_device)
    progress = progress_from(manifest.state)
    # Steps after the checkpoint are done again; what their first time took was spent all the same.
    progress.charge(on_rank0(lambda: spent_before(run_dir)))
    if engine.rank == 0:
        changes = ("" if same_layout else ", in another layout") + (
            "" if same_device else ", on another kind of device"
        )
        note(f"resuming from {checkpoint} at step {progress.step}{changes}")
    return progress


def make_report(
    config: RunConfig, engine: Engine, energy: JobEnergy, *, progress: Progress, starts: Starts
) -> Report:
    """What report.json says; every number is counted, metered or closed-form. Collective."""
    shape = shape_of(config.model)
    spent = energy.report(
        progress.energy_j,
        wall_s=progress.wall_s,
        node_j=progress.node_j,
        problem=starts.problem,
        earlier_steps_j=starts.steps_j[:-1],
        sizes=starts.sizes,
    )
    quotable = progress.energy_j > 0 and spent.validity != "invalid"
    return Report(
        run=config.run.name,
        commit=_git_commit(),
        steps=progress.step,
        tokens=progress.tokens,
        params_total=engine.params_total,
        params_active=params_active(shape),
        flops_per_token=flops_per_token(shape, config.data.seq_length),
        loss_first=progress.loss_first,
        loss_last=progress.loss_last,
        heldout_loss=progress.heldout_loss,
        heldout_bits_per_byte=progress.heldout_bits_per_byte,
        tokens_per_s=progress.tokens / progress.wall_s,
        wall_s=progress.wall_s,
        layout=Layout(**engine.layout.as_dict()),
        engine=config.engine.name,
        device=engine.device,
        energy=spent,
        tokens_per_j=progress.tokens / progress.energy_j if quotable else None,
        campaign=Campaign(
            starts=starts.number,
            campaign_j=progress.energy_j,
            useful_j=progress.useful_j,
            goodput=progress.useful_j / progress.energy_j if progress.energy_j > 0 else None,
        ),
    )


def _git_commit() -> str | None:
    """Commit of the library's own checkout; None when it is installed elsewhere, be it inside another one."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    top, _, commit = done.stdout.strip().partition("\n")
    return commit if done.returncode == 0 and Path(top) == root else None
