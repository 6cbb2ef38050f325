"""The command `moe`: reads argv and environment, then calls one function of the library.

Heavy imports happen inside the verbs, so that help answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe import __version__
from moe.cli_convert import convert_app
from moe.cli_data import data_app
from moe.cli_energy import energy_app
from moe.cli_launch import doctor, launch, node
from moe.cli_shared import AsJson, epilog, note
from moe.errors import InputError, MoeError, RankLostError, RunInterruptedError

if TYPE_CHECKING:
    from moe.config import RunConfig

# A rank that lost another waits this long, so that the launcher sees the one that failed first.
BLAME_DELAY_S = 2.0

app = typer.Typer(
    epilog=epilog("moe train configs/quickstart.yaml"),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(convert_app, name="convert")
app.add_typer(energy_app, name="energy")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, for example optim.lr=3e-4.")
]
RunDir = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a run.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moe {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Train sparse Mixture-of-Experts models, with tokens per joule measured."""


@app.command(epilog=epilog("moe train configs/quickstart.yaml optim.lr=3e-4 --nproc 4 parallel.tp=2"))
def train(
    config: Annotated[Path, typer.Argument(help="A YAML recipe; see configs/.")],
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start on this machine; by default 1.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the run; by default run.root/run.name.")
    ] = None,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="Go on where the folder has a checkpoint, else begin.")
    ] = False,
) -> None:
    """Train a model.

    Starts --nproc ranks on this machine; under torchrun, this process is one of the ranks. SIGTERM or SIGUSR1
    writes a checkpoint and ends the run with exit code 5.
    """
    from moe.config import load_config
    from moe.train.folder import choose_run_dir, refuse_existing

    world_size = _world_size(nproc, default=1)
    resolved = load_config(config, overrides or [], world_size=world_size)
    folder = choose_run_dir(resolved, run_dir, under_torchrun=_under_torchrun() or auto_resume)
    if not _under_torchrun() and not auto_resume:
        refuse_existing(folder)  # before any process starts; under torchrun rank 0 looks
    if world_size > 1 and not _under_torchrun():
        again = ["--auto-resume"] if auto_resume else []
        argv = ["train", str(config), *(overrides or []), "--run-dir", str(folder), *again]
        _launch(argv, folder, num_ranks=world_size)
    else:
        _run(resolved, folder, resume=False, auto_resume=auto_resume)


@app.command(epilog=epilog("moe resume runs/quickstart train.steps=600 --nproc 2 parallel.ep=2"))
def resume(
    run_dir: RunDir,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start; by default as many as wrote the checkpoint.")
    ] = None,
) -> None:
    """Continue a run.

    Starts from its newest intact checkpoint, in the same layout or another. More train.steps stretch the
    learning-rate decay, unless optim.decay_steps fixes it.
    """
    from moe.config import load_config
    from moe.train.folder import check_unchanged, ranks_of_newest

    world_size = _world_size(nproc, default=ranks_of_newest(run_dir))
    resolved = load_config(run_dir / "config.yaml", overrides or [], world_size=world_size)
    check_unchanged(run_dir, resolved)
    if world_size > 1 and not _under_torchrun():
        _launch(["resume", str(run_dir), *(overrides or [])], run_dir, num_ranks=world_size)
    else:
        _run(resolved, run_dir, resume=True)


@app.command(epilog=epilog("moe verify runs/quickstart/checkpoints/step_00000200"))
def verify(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A step_NNNNNNNN folder.")],
    as_json: AsJson = False,
) -> None:
    """Check every bit of a checkpoint."""
    from moe.checkpoint.manifest import verify as verify_files

    manifest = verify_files(checkpoint, workers=os.cpu_count() or 1)
    size_bytes = sum(entry.size_bytes for entry in manifest.files)
    facts = {"step": manifest.step, "files": len(manifest.files), "bytes": size_bytes, "intact": True}
    sentence = (
        f"{checkpoint}: step {manifest.step}, {len(manifest.files)} files, {size_bytes:,} bytes, intact"
    )
    typer.echo(json.dumps(facts) if as_json else sentence)


@app.command(epilog=epilog("moe plot runs/quickstart"))
def plot(run_dir: RunDir) -> None:
    """Draw loss, expert load and power of a run."""
    from moe.metering.plots import plot_run

    for path in plot_run(run_dir):
        typer.echo(str(path))


@app.command(epilog=epilog("moe plan configs/quickstart.yaml --gpus 2 --gpu h100 parallel.ep=2"))
def plan(
    config: Annotated[Path | None, typer.Argument(help="A YAML recipe; see configs/.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, of plan.* too.")
    ] = None,
    *,
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs.")] = 1,
    gpu: Annotated[str, typer.Option(help="h100, h200, b200, b300, gb200, gb300, or a YAML file.")] = "h100",
    search: Annotated[bool, typer.Option("--search", help="Try every layout.")] = False,
    objective: Annotated[str, typer.Option(help="Of --search: time or tokens_per_j.")] = "time",
    what_if: Annotated[
        list[str] | None, typer.Option("--what-if", metavar="KEY=VALUE", help="Compare; may be repeated.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="tomakomai, sakai, or a site file.")] = None,
    png: Annotated[Path | None, typer.Option(file_okay=False, help="Folder for pictures.")] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Compare with published runs; needs no config.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Know memory, step time, energy and cost before a GPU starts.

    plan.KEY=VALUE says what no run has a key for: precision, routing, recompute, dispatcher, kernels, zero,
    grads, moments, overlap_ep, cuda_graph and more (class PlanSection).
    """
    from moe.planner.command import Request, run_request

    request = Request(
        config=config,
        overrides=overrides or [],
        gpus=gpus,
        gpu=gpu,
        search=search,
        objective=objective,
        what_if=what_if or [],
        site=site,
        png=png,
        validate=validate,
    )
    typer.echo(run_request(request, as_object=as_json))


app.command(epilog=epilog("moe launch configs/quickstart.yaml --on slurm --nodes 64"))(launch)
app.command(epilog=epilog("moe node c.yaml --run-dir r --nodes 2 --gpus-per-node 8 --endpoint n0:29500"))(
    node
)
app.command(epilog=epilog("moe doctor configs/quickstart.yaml --nproc 2"))(doctor)


def _under_torchrun() -> bool:
    return "RANK" in os.environ


def _world_size(nproc: int | None, *, default: int) -> int:
    if not _under_torchrun():
        return nproc or default
    if nproc is not None:
        raise InputError(f"--nproc {nproc} under torchrun, which has started the ranks already; leave it out")
    world_size = os.environ.get("WORLD_SIZE", "")
    if not world_size.isdecimal() or int(world_size) < 1:
        raise InputError(
            f"RANK is set, as torchrun does, but WORLD_SIZE={world_size!r} is no number of ranks; "
            "start with torchrun, or unset RANK and use --nproc"
        )
    return int(world_size)


def _launch(arguments: list[str], run_dir: Path, *, num_ranks: int) -> None:
    from moe.launch.local import launch_local

    launch_local(arguments, num_ranks=num_ranks, run_dir=run_dir, note=note)


def _run(config: RunConfig, run_dir: Path, *, resume: bool, auto_resume: bool = False) -> None:
    from moe.train.stop import StopRequest

    stop = StopRequest()
    # A rank under a launcher keeps SIGTERM's default, for it may hang in a collective; SIGUSR1 asks it.
    stop.listen(signal.SIGUSR1, *([] if _under_torchrun() else [signal.SIGTERM]))
    from moe.quiet import quiet_third_party

    quiet_third_party()
    from moe.launch.agent import INTERRUPTED
    from moe.launch.local import end_with_parent
    from moe.ranks import explain_lost_rank
    from moe.train.run import RunOptions, run_job

    if _under_torchrun():
        end_with_parent()
    try:
        run_job(config, RunOptions(run_dir, resume, note, auto_resume=auto_resume, stop=stop))
    except MoeError:
        raise
    except KeyboardInterrupt as error:
        raise RunInterruptedError(INTERRUPTED) from error
    except Exception as error:
        lost = explain_lost_rank(error)
        if lost is None:
            raise
        raise RankLostError(lost) from error


def main() -> None:
    """Entry point: an error that a user can act on is one message and its documented exit code."""
    try:
        app(prog_name="moe")
    except MoeError as error:
        if os.environ.get("RANK", "0") == "0" or not error.on_all_ranks:
            typer.echo(f"error: {error}", err=True)
        sys.stdout.flush()
        sys.stderr.flush()
        if _under_torchrun():
            if isinstance(error, RankLostError):
                time.sleep(BLAME_DELAY_S)
            # Without teardown: after an error the process groups cannot be left in order and may hang.
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
