"""`moe doctor`: alone it starts ranks of its own; under a launcher it is one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe.config.load import load_config
from moe.launch.doctor.report import DoctorError


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for."""

    config: Path | None
    overrides: Sequence[str]
    run_dir: Path | None
    grace_s: int
    as_json: bool


def doctor_rank(request: Request, say: Callable[[str], None]) -> None:
    """Examine as one rank of a job; rank 0 says what was found.

    Raises:
        DoctorError: a check failed.
        InputError: the config cannot be used.
    """
    from moe.launch.doctor.examine import Patient, examine

    config = None
    run_dir = request.run_dir
    if request.config is not None:
        config = load_config(request.config, request.overrides, world_size=None)
        run_dir = run_dir or config.run.root / config.run.name
    report = examine(Patient(config=config, run_dir=run_dir, grace_s=request.grace_s))
    say(report.as_json() if request.as_json else report.as_table())
    failed = report.failed()
    if failed:
        raise DoctorError(f"{len(failed)} check(s) failed: {', '.join(failed)}")


def doctor_launcher(request: Request, num_ranks: int | None, note: Callable[[str], None]) -> None:
    """Examine this machine with ranks of its own.

    Args:
        request: What is asked for; passed on to the ranks.
        num_ranks: None is one for each GPU and at least two, for one has nobody to talk to.
        note: told what a person should know.

    Raises:
        MoeError: a check failed, with exit code 1, or a rank was lost.
    """
    import torch

    from moe.launch.local import launch_local

    folder = [] if request.run_dir is None else [f"--run-dir={request.run_dir}"]
    recipe = [] if request.config is None else [str(request.config), *request.overrides]
    launch_local(
        [
            "doctor",
            *recipe,
            *folder,
            f"--grace-s={request.grace_s}",
            *(["--json"] if request.as_json else []),
        ],
        num_ranks=num_ranks or max(2, torch.cuda.device_count()),
        run_dir=request.run_dir or Path(),
        note=note,
    )
