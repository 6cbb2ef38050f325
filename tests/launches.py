"""Jobs for the tests of `moe launch`, rendered and real; imported as launches."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from moe.launch.command import Request, make_job
from moe.launch.job import Job

Start = Callable[..., "subprocess.Popen[str]"]
# Two ranks that share the experts, without a checkpoint before the end unless something asks for one.
STEPS = 12
OVERRIDES = (f"train.steps={STEPS}", "checkpoint.interval=0", "parallel.ep=2")
RECIPE = Path(__file__).parents[1] / "configs" / "quickstart.yaml"

# What a shell, YAML or an option parser could take for syntax.
HOSTILE = [
    "a b",
    "a'b",
    'a"b',
    "a\nb",
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "a && touch pwned",
    "-rf",
    "--wrap=touch pwned",
    "*",
    "~",
    "${HOME}",
    "a\\",
    "!!python/object/apply:os.system [touch pwned]",
    "a: b",
    "# a",
    "%j",
    "{port}",
]


def job(
    *overrides: str,
    on: str,
    nodes: int = 1,
    gpus_per_node: int = 8,
    run_dir: Path | None = None,
    environment: Mapping[str, str] | None = None,
    config: Path = RECIPE,
) -> Job:
    """A job as the command line would make it."""
    world_size = nodes * gpus_per_node
    fit = [f"train.global_batch_size={world_size * 2}", f"train.eval_sequences={world_size * 2}"]
    return make_job(
        Request(
            config=config,
            overrides=[*fit, "train.micro_batch_size=1", *overrides],
            on=on,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            run_dir=run_dir,
            cluster=None,
            environment=environment or {},
            submit=False,
        )
    )


def end(process: subprocess.Popen[str], *, expect: int) -> str:
    output, _ = process.communicate(timeout=90)
    assert process.returncode == expect, output
    assert "Traceback" not in output
    return output


def last(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / f"step_{STEPS:08d}"


def only_rank(node: subprocess.Popen[str]) -> psutil.Process:
    """The rank of a node, whichever the rendezvous gave it."""
    return next(child for child in psutil.Process(node.pid).children() if "RANK" in child.environ())
