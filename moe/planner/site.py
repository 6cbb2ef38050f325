"""Where a run would take place: power, cooling, emissions, prices."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from moe.config.schema import NonNegative, Positive, Section
from moe.config.tree import ConfigTree
from moe.errors import InputError


class Site(Section):
    """A site file. The defaults are national figures of Japan.

    Attributes:
        name: For people.
        power_w: What the site may draw in all; 0: no limit is known.
        pue: Facility power over IT power.
        grid_g_per_kwh: CO2 of the grid: Japan's lifecycle figure of 2023 by default (Our World in Data).
        yen_per_kwh: Electricity.
        yen_per_gpu_hour: All other cost of a GPU.
        mtbf_gpu_hours: Hours of one GPU between interruptions of the job. Llama 3 405B: 419 unexpected ones
            in 54 days on 16,384 H100 (arXiv 2407.21783, section 3.3.4).
        restart_s: From a failure to the first new step.
        checkpoint_bytes_per_s: Written by the ranks of one GPU, side by side.
    """

    name: str = "Japan"
    power_w: NonNegative = 0.0
    pue: Annotated[float, Field(ge=1)] = 1.4
    grid_g_per_kwh: NonNegative = 485.0
    yen_per_kwh: NonNegative = 20.0
    yen_per_gpu_hour: NonNegative = 300.0
    mtbf_gpu_hours: Positive = 50_700.0
    restart_s: NonNegative = 600.0
    checkpoint_bytes_per_s: Positive = 250e6


def load_site(name: str | None) -> Site:
    """A site by name or file; None is Japan's averages.

    Raises:
        InputError: There is no such site, or its file is wrong.
    """
    if name is None:
        return Site()
    folder = Path(str(resources.files("moe.planner"))) / "sites"
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    path = known.get(name, Path(name))
    if not path.is_file():
        raise InputError(f"--site {name}: no such file; known: {', '.join(known)}")
    try:
        return Site.model_validate(ConfigTree(path).values)
    except ValidationError as error:
        raise InputError(f"--site {name}: {error}") from error
