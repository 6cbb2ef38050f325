"""`moe launch`: from a recipe to a scheduler's job, shown or submitted."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe.durable import write_atomically
from moe.errors import InputError, MoeError
from moe.launch.environment import job_environment
from moe.launch.hostfile import deepspeed_launch
from moe.launch.job import Job, Launch
from moe.launch.kubernetes import kubernetes_launch
from moe.launch.layout import layout_table
from moe.launch.local import launch_local
from moe.launch.settings import load_launch
from moe.launch.slurm import slurm_launch

Note = Callable[[str], None]
TARGETS: Mapping[str, Callable[[Job], Launch]] = {
    "slurm": slurm_launch,
    "kubernetes": kubernetes_launch,
    "deepspeed": deepspeed_launch,
}
LOCAL = "local"


class SubmitError(MoeError):
    """The scheduler refused the job; the text is what it said."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for."""

    config: Path
    overrides: Sequence[str]
    on: str
    nodes: int
    gpus_per_node: int
    run_dir: Path | None
    cluster: Path | None
    environment: Mapping[str, str]  # the submitter's
    submit: bool


def launch(request: Request, note: Note) -> str:
    """Show a job, or submit it; returns what belongs on stdout: the script, or what the scheduler answered.

    Raises:
        InputError: something asked for cannot be used; the text names it.
        SubmitError: the scheduler refused the job.
        MoeError: a local job failed; see moe.launch.agent.run_node.
    """
    job = make_job(request)
    note(layout_table(job.config.parallel, nodes=job.nodes, gpus_per_node=job.gpus_per_node))
    if request.on == LOCAL:
        return _local(job, request, note)
    made = TARGETS[request.on](job)
    if not request.submit:
        for path in made.files:
            note(f"would write {path}")
        note(f"would run {shlex.join(made.submit)}")
        return made.text
    return submit(made, note)


def make_job(request: Request) -> Job:
    """Check a request and resolve its config."""
    if request.on not in (LOCAL, *TARGETS):
        raise InputError(f"--on {request.on} is unknown; allowed: {', '.join((LOCAL, *TARGETS))}")
    if request.on == LOCAL and request.nodes != 1:
        raise InputError(f"--on local is one node, not --nodes {request.nodes}; use --gpus-per-node")
    config = load_launch(
        request.config,
        request.overrides,
        cluster=request.cluster,
        world_size=request.nodes * request.gpus_per_node,
    )
    run_dir = request.run_dir or config.run.root / config.run.name
    return Job(
        config=config,
        run_dir=Path(os.path.abspath(run_dir)),  # noqa: PTH100 - resolve() would follow links of this machine
        nodes=request.nodes,
        gpus_per_node=request.gpus_per_node,
        environment=job_environment(config, request.environment),
    )


def _local(job: Job, request: Request, note: Note) -> str:
    argv = job.train_argv(str(job.config_file))
    if not request.submit:
        note(f"would write {job.config_file}")
        return shlex.join([job.python, "-m", "moe", *argv, f"--nproc={job.gpus_per_node}"]) + "\n"
    write_atomically(job.config_file, job.config_text)
    os.environ.update({setting.name: setting.value for setting in job.environment})
    launch_local(
        argv,
        num_ranks=job.gpus_per_node,
        run_dir=job.run_dir,
        note=note,
        max_restarts=job.config.launch.max_restarts,
    )
    return ""


def submit(made: Launch, note: Note) -> str:
    """Write the files of a launch and hand it to its scheduler.

    Returns:
        What the scheduler printed.

    Raises:
        InputError: the scheduler's command is missing here, or a file cannot be written.
        SubmitError: the scheduler refused the job.
    """
    program = made.submit[0]
    if shutil.which(program) is None:
        raise InputError(
            f"{program} is not on PATH, so the job cannot be submitted from here; "
            "go to a machine that has it, or use --dry-run"
        )
    for path, content in made.files.items():
        write_atomically(path, content)
        note(f"wrote {path}")
    done = subprocess.run(
        list(made.submit),
        env={**os.environ, **made.environment},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SubmitError(f"{program} ended with exit code {done.returncode}; what it said is above")
    return done.stdout
