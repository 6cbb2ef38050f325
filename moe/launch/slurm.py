"""A job as an sbatch script: one `moe node` on every node, requeued until it is done.

The script is bash because sbatch wants one. Values of a user stand in it as shlex.quote writes them, or, on
the #SBATCH lines that Slurm reads by rules of its own, only where settings.py has checked every character.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from moe.errors import RunStoppedError
from moe.launch.job import Job, Launch

# Nodes end within seconds of each other. One that does not is stuck.
STRAGGLER_S = 120

_SCRIPT = """\
#!/bin/bash
# Written by `moe launch`. Starts one `moe node` on every node; that starts the ranks and restarts lost ones.
# A stop on request leaves a checkpoint and exit code {stopped}; started again, the job goes on from it.
{directives}
set -uo pipefail

# --export=NONE kept the submitter's environment out; srun shall pass on what is set from here on.
unset SLURM_EXPORT_ENV
{exports}

node=(
{node}
)
steps=(
{srun}
)
# The first node is where all meet.
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=(--endpoint="$head:{port}" --job-id="$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}")
srun "${{steps[@]}}" --cpus-per-task="$SLURM_CPUS_ON_NODE" "${{node[@]}}" "${{address[@]}}" &
step=$!

# USR1 comes {grace_s} s before the time limit, TERM with a preemption or scancel.
# srun hands USR1 on to every node.
asked=
trap 'asked=limit; kill -USR1 "$step"' USR1
trap 'asked=ended; kill -USR1 "$step"' TERM
# A signal ends a wait, not the step; bash keeps the step's exit code for the last wait.
while kill -0 "$step" 2> /dev/null; do
  wait "$step"
done
code=0
wait "$step" || code=$?

if [[ $code -eq {stopped} && $asked == limit ]]; then
  scontrol requeue "$SLURM_JOB_ID"
elif [[ $code -eq {stopped} && $asked == ended ]]; then
  # Slurm requeues a preempted job if it finds it still there at the end of the grace time.
  sleep {grace_s}
fi
exit "$code"
"""


def slurm_launch(job: Job) -> Launch:
    """The script and how it is submitted."""
    script = job.folder / "job.sbatch"
    # Paths go on sbatch's command line, where no character is special but Slurm's own %.
    log = str(job.folder / "slurm-JOB.log").replace("%", "%%").replace("slurm-JOB.log", "slurm-%j.log")
    text = render(job)
    return Launch(
        text=text,
        files={script: text, job.config_file: job.config_text},
        submit=["sbatch", "--parsable", f"--chdir={Path.cwd()}", f"--output={log}", str(script)],
    )


def render(job: Job) -> str:
    """The script."""
    launch = job.config.launch
    argv = [job.python, "-m", "moe", *job.node_argv(str(job.config_file))]
    steps = [
        f"--nodes={job.nodes}",
        f"--ntasks={job.nodes}",
        "--ntasks-per-node=1",
        "--cpu-bind=none",  # the ranks share the node's cores among themselves
        "--kill-on-bad-exit=0",  # a node that ends lets the others end by themselves
        f"--wait={STRAGGLER_S}",
        *launch.slurm.srun,
    ]
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH {line}" for line in _directives(job)),
        exports="\n".join(
            f"# {setting.reason}\nexport {setting.name}={shlex.quote(setting.value)}"
            for setting in job.environment
        ),
        node=_words(argv),
        srun=_words(steps),
        port=launch.port,
        grace_s=launch.grace_s,
        stopped=RunStoppedError.exit_code,
    )


def _words(argv: list[str]) -> str:
    return "\n".join(f"  {shlex.quote(word)}" for word in argv)


def _directives(job: Job) -> Iterator[str]:
    slurm = job.config.launch.slurm
    yield f"--job-name={job.config.run.name}"
    yield f"--nodes={job.nodes}"
    yield "--ntasks-per-node=1"
    yield f"--gpus-per-node={job.gpus_per_node}"
    yield "--exclusive"
    yield "--mem=0"  # all of a node's
    for option, value in (
        ("partition", slurm.partition),
        ("account", slurm.account),
        ("qos", slurm.qos),
        ("time", slurm.time_limit),
    ):
        if value is not None:
            yield f"--{option}={value}"
    yield "--requeue"  # also after a node failed
    yield "--open-mode=append"  # a requeued job goes on with its log
    yield f"--signal=B:USR1@{job.config.launch.grace_s}"
    yield "--export=NONE"
