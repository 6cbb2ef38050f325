"""The verbs that start jobs and look at machines: `moe launch`, `moe node`, `moe doctor`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from moe.cli_shared import AsJson, note

Recipe = Annotated[Path, typer.Argument(help="A YAML recipe; see configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, for example optim.lr=3e-4.")
]
Nodes = Annotated[int, typer.Option(min=1, help="Machines.")]
GpusPerNode = Annotated[int, typer.Option(min=1, help="Ranks of each.")]
GraceS = Annotated[int, typer.Option(min=1, help="Seconds from a scheduler's signal to the end.")]


def launch(
    config: Recipe,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, of launch.* too.")
    ] = None,
    *,
    on: Annotated[str, typer.Option(help="local, slurm, kubernetes or deepspeed.")] = "local",
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = 8,
    run_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the run, which all nodes see.")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="YAML with the content of launch.*, for all runs of a cluster.")
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit/--dry-run", help="Submit, or show what would be submitted.")
    ] = False,
) -> None:
    """Start a job on one machine or many.

    The dry run, which is the default, prints the script on stdout and the ranks' layout on stderr. A job that
    is started again goes on from its newest checkpoint.
    """
    from moe.launch.command import Request
    from moe.launch.command import launch as launch_job

    request = Request(
        config=config,
        overrides=overrides or [],
        on=on,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        run_dir=run_dir,
        cluster=cluster,
        environment=os.environ,
        submit=submit,
    )
    typer.echo(launch_job(request, note), nl=False)


def node(
    config: Recipe,
    overrides: Overrides = None,
    *,
    run_dir: Annotated[Path, typer.Option(file_okay=False, help="Folder of the run, which all nodes see.")],
    nodes: Nodes,
    gpus_per_node: GpusPerNode,
    endpoint: Annotated[str, typer.Option(metavar="HOST:PORT", help="One of the machines; all meet there.")],
    job_id: Annotated[str, typer.Option(help="The same on all machines.")] = "joulemoe",
    max_restarts: Annotated[int, typer.Option(min=0, help="In a row without a new checkpoint.")] = 3,
    preflight: Annotated[bool, typer.Option("--preflight", help="Run moe doctor first.")] = False,
    grace_s: GraceS = 600,
    address: Annotated[str | None, typer.Option(help="What the others call this machine.")] = None,
) -> None:
    """Be one machine of a job; `moe launch` runs this on each.

    Lost ranks are started again. SIGTERM or SIGUSR1 lets all write a checkpoint and end with exit code 5.
    """
    from moe.launch.node import NodeRequest, start_node

    request = NodeRequest(
        config=config,
        overrides=overrides or [],
        run_dir=run_dir,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        endpoint=endpoint,
        job_id=job_id,
        max_restarts=max_restarts,
        preflight=preflight,
        grace_s=grace_s,
        address=address,
    )
    start_node(request, note)


def doctor(
    config: Annotated[Path | None, typer.Argument(help="A YAML recipe, whose checkpoints must fit.")] = None,
    overrides: Overrides = None,
    *,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start; by default one a GPU, at least 2.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(file_okay=False, help="Where the run will be.")] = None,
    grace_s: GraceS = 600,
    as_json: AsJson = False,
) -> None:
    """Check this machine, or under a launcher all machines of a job.

    Exit code 0 means that no check failed; warnings are worth a look. A failed check gives 1.
    """
    from moe.launch.doctor.command import Request, doctor_launcher, doctor_rank

    request = Request(
        config=config, overrides=overrides or [], run_dir=run_dir, grace_s=grace_s, as_json=as_json
    )
    rank = os.environ.get("RANK")
    if rank is None and nproc != 1:
        doctor_launcher(request, nproc, note)
    else:
        doctor_rank(request, typer.echo if rank in (None, "0") else lambda _text: None)
