"""The command `moe`: reads argv and environment, then calls one function of the library.

Heavy imports happen inside the verbs, so that help answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe import __version__
from moe.errors import InputError, MoeError, RankLostError, RunInterruptedError

if TYPE_CHECKING:
    from moe.config import RunConfig

# A rank that lost another waits this long, so that the launcher sees the one that failed first.
BLAME_DELAY_S = 2.0

_EXIT_CODES = """\
Exit codes:
  0  done
  1  anything else
  2  bad input or config
  3  corrupt data or checkpoint
  4  a rank was lost"""


def _epilog(example: str) -> str:
    # A paragraph that begins with "\b" keeps its lines; others are filled.
    return f"\b\nExample:\n  {example}\n\n\b\n{_EXIT_CODES}"


app = typer.Typer(
    epilog=_epilog("moe train configs/quickstart.yaml"),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(
    help="Prepare and fetch training text.",
    epilog=_epilog("moe data prepare --input corpus/ --tokenizer bytes --out data/corpus"),
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, for example optim.lr=3e-4.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a sentence.")]
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


@app.command(epilog=_epilog("moe train configs/quickstart.yaml optim.lr=3e-4 --nproc 4 parallel.tp=2"))
def train(
    config: Annotated[Path, typer.Argument(help="A YAML recipe; see configs/.")],
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start on this machine; by default 1.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the run; by default run.root/run.name.")
    ] = None,
) -> None:
    """Train a model.

    Starts --nproc ranks on this machine; under torchrun, this process is one of the ranks.
    """
    from moe.config import load_config
    from moe.train.folder import choose_run_dir, refuse_existing

    world_size = _world_size(nproc, default=1)
    resolved = load_config(config, overrides or [], world_size=world_size)
    folder = choose_run_dir(resolved, run_dir, under_torchrun=_under_torchrun())
    if not _under_torchrun():
        refuse_existing(folder)  # before any process starts; under torchrun rank 0 looks
    if world_size > 1 and not _under_torchrun():
        argv = ["train", str(config), *(overrides or []), "--run-dir", str(folder)]
        _launch(argv, num_ranks=world_size)
    else:
        _run(resolved, folder, resume=False)


@app.command(epilog=_epilog("moe resume runs/quickstart train.steps=600 --nproc 2 parallel.ep=2"))
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
        _launch(["resume", str(run_dir), *(overrides or [])], num_ranks=world_size)
    else:
        _run(resolved, run_dir, resume=True)


@app.command(epilog=_epilog("moe verify runs/quickstart/checkpoints/step_00000200"))
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


@app.command(epilog=_epilog("moe plot runs/quickstart"))
def plot(run_dir: RunDir) -> None:
    """Draw loss, expert load and power of a run."""
    from moe.metering.plots import plot_run

    for path in plot_run(run_dir):
        typer.echo(str(path))


@data_app.command(epilog=_epilog("moe data prepare --input corpus/ --tokenizer bytes --out data/corpus"))
def prepare(
    inputs: Annotated[
        list[Path], typer.Option("--input", help="A text or JSONL file, or a directory; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="PREFIX of the PREFIX.bin and PREFIX.idx to write.")],
    tokenizer: Annotated[str, typer.Option(help="A tokenizer.json, or `bytes`.")],
    json_key: Annotated[str, typer.Option(help="Key of the text in JSONL lines.")] = "text",
    as_json: AsJson = False,
) -> None:
    """Tokenise text into the .bin/.idx files that training reads."""
    from moe.data.prepare import prepare as prepare_files
    from moe.data.tokenizer import Tokenizer

    report = prepare_files(inputs, Tokenizer.load(tokenizer), out, json_key=json_key, on_progress=_note)
    sentence = (
        f"{out}: {report.documents:,} documents, {report.tokens:,} tokens, {report.bytes:,} bytes of text"
    )
    typer.echo(json.dumps(asdict(report)) if as_json else sentence)


@data_app.command(epilog=_epilog("moe data fetch handbook --out data/handbook"))
def fetch(
    corpus: Annotated[str, typer.Argument(help="handbook: Japanese and English manuals of Debian.")],
    out: Annotated[Path, typer.Option(help="Directory to write to.")],
) -> None:
    """Fetch a known corpus.

    The only verb that uses the network.
    """
    from moe.data.fetch_handbook import fetch_handbook

    if corpus != "handbook":
        raise InputError(f"unknown corpus {corpus!r}; allowed: handbook")
    report = fetch_handbook(out, on_progress=_note)
    for text in report.texts:
        typer.echo(f"{text.path}: {text.documents:,} documents, {text.text_bytes:,} bytes of text")


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


def _launch(arguments: list[str], *, num_ranks: int) -> None:
    from moe.launch.local import launch_local

    launch_local("moe", arguments, num_ranks=num_ranks)


def _run(config: RunConfig, run_dir: Path, *, resume: bool) -> None:
    from moe.quiet import quiet_third_party

    quiet_third_party()
    from moe.launch.local import INTERRUPTED, end_with_parent
    from moe.ranks import explain_lost_rank
    from moe.train.run import RunOptions, run_job

    if _under_torchrun():
        end_with_parent()
    else:
        # A scheduler's SIGTERM ends the run in order. A rank keeps the default: it may hang in a collective.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_job(config, RunOptions(run_dir, resume, _note))
    except MoeError:
        raise
    except KeyboardInterrupt as error:
        raise RunInterruptedError(INTERRUPTED) from error
    except Exception as error:
        lost = explain_lost_rank(error)
        if lost is None:
            raise
        raise RankLostError(lost) from error


def _note(text: str) -> None:
    """A message for a person, beside the numbers."""
    typer.echo(text, err=True)


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
