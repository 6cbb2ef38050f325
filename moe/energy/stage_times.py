"""Times of pipeline stages: planned, from `moe plan --json`, or measured, from a run folder.

`stage_times.json` of a run folder is written by `torchrun ... -m benchmarks.measure_stage_times RUN_DIR`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe.energy.clock_plan import Stages
from moe.errors import InputError
from moe.planner.layout import Layout

STAGE_TIMES_FILE = "stage_times.json"


def read_stages(path: Path) -> Stages:
    """Stages from a run folder or from a plan.

    Raises:
        InputError: There is nothing of the kind at `path`.
    """
    file = path / STAGE_TIMES_FILE if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise InputError(
            f"{path} has no {STAGE_TIMES_FILE}: measure with `torchrun --nproc-per-node N -m "
            f"benchmarks.measure_stage_times {path}`, or give a file with the output of `moe plan --json`"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return _measured(values, file) if path.is_dir() else _planned(values, file)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} has no stage times: {type(error).__name__} {error}") from error


def _planned(values: dict[str, Any], file: Path) -> Stages:
    layout = values["layout"]
    busy_s, shares = values["microbatch_s_by_stage"], values["forward_share_by_stage"]
    return Stages(
        layout=Layout(gpus=layout["gpus"], pp=layout["pp"], vpp=layout["vpp"]),
        num_microbatches=values["num_microbatches"],
        forward_s=tuple(time_s * share for time_s, share in zip(busy_s, shares, strict=True)),
        backward_s=tuple(time_s * (1 - share) for time_s, share in zip(busy_s, shares, strict=True)),
        basis=f"planned: {file}",
    )


def _measured(values: dict[str, Any], file: Path) -> Stages:
    forward_s, backward_s = tuple(values["forward_s"]), tuple(values["backward_s"])
    if len(forward_s) != len(backward_s):
        raise ValueError(f"{len(forward_s)} forward times and {len(backward_s)} backward times")
    return Stages(
        layout=Layout(gpus=len(forward_s), pp=len(forward_s), vpp=values["vpp"]),
        num_microbatches=values["num_microbatches"],
        forward_s=forward_s,
        backward_s=backward_s,
        basis=f"measured on {values['device']}: {file}",
    )
