"""What `moe energy clock-plan` and `hold-clock` do: a plan file is made, and a stage's clocks are held."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from moe.durable import write_atomically
from moe.energy.clock_plan import ClockPlan, Clocks, plan_clocks
from moe.energy.grid import parse_grid, parse_share
from moe.energy.power_control import PowerControl, open_nvml
from moe.energy.stage_times import read_stages
from moe.errors import InputError
from moe.planner.hardware_file import find_gpu


def make_plan_file(
    source: Path, out: Path, *, gpu: str, clocks: str, compute_share: float, max_slowdown: str
) -> ClockPlan:
    """Plan the clocks of a pipeline and write the plan.

    Raises:
        InputError: An argument is wrong, or `source` has no stage times.
    """
    hardware = find_gpu(gpu)
    grid_mhz = sorted(setting.clock_mhz or 0 for setting in parse_grid(clocks, "clock_mhz"))
    power = Clocks(
        grid_mhz=tuple(grid_mhz),
        compute_share=compute_share,
        busy_w=hardware.tdp_w,
        idle_w=hardware.idle_w,
    )
    plan = plan_clocks(read_stages(source), power, max_slowdown=parse_share(max_slowdown))
    write_atomically(out, json.dumps(plan.as_object(), indent=1) + "\n")
    return plan


def hold(
    plan_file: Path, stage: int, uuids: Sequence[str], *, allowed: bool, note: Callable[[str], None]
) -> None:
    """Lock the clocks of GPUs as a plan says for their stage, until this process is told to end.

    Raises:
        InputError: The plan has no such stage, changes were not allowed, or rights are missing.
    """
    clock_mhz = _clock_of(plan_file, stage)
    with open_nvml() as nvml, PowerControl(nvml, uuids, allowed=allowed) as control:
        control.lock_clock(clock_mhz)
        note(f"stage {stage}: {len(uuids)} GPUs at {clock_mhz} MHz until Ctrl-C or SIGTERM")
        note("after SIGKILL, run: " + "; ".join(control.undo_commands))
        signal.pause()


def _clock_of(plan_file: Path, stage: int) -> int:
    try:
        stages = json.loads(plan_file.read_text(encoding="utf-8"))["stages"]
        clocks = {entry["stage"]: int(entry["clock_mhz"]) for entry in stages}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{plan_file} is no clock plan: {type(error).__name__} {error}") from error
    if stage not in clocks:
        raise InputError(f"--stage {stage}: the plan has stages {', '.join(map(str, clocks))}")
    return clocks[stage]
