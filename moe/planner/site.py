"""Where a run takes place: power, cooling, emissions, prices.

One file a site (configs/sites), read twice: the ledger of a run takes what a source states and says `unknown`
for the rest; the planner, which has to give an answer, takes assumptions for the rest and names them.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field, ValidationError

from moe.config.schema import NonNegative, Positive, Section
from moe.config.tree import ConfigTree
from moe.errors import InputError

UNKNOWN: Literal["unknown"] = "unknown"
Pue = Annotated[float, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]

Number = TypeVar("Number")


class Sourced(Section, Generic[Number]):
    """A figure and who states it."""

    value: Number
    source: Annotated[str, Field(min_length=1)]


class SiteFile(Section):
    """What is known of a site: each figure has a source, or is `unknown`.

    Attributes:
        name: For people.
        name_ja: Likewise, in Japanese; empty: as `name`.
        power_w: What the site may draw in all.
        pue: Facility power over IT power.
        grid_g_per_kwh: Location-based CO2 of the grid, over a year.
        renewable_share: Of the electricity that is bought.
        yen_per_kwh: Electricity.
        yen_per_gpu_hour: All other cost of a GPU, capital and operation.
    """

    name: str
    name_ja: str = ""
    power_w: Sourced[NonNegative] | Literal["unknown"] = UNKNOWN
    pue: Sourced[Pue] | Literal["unknown"] = UNKNOWN
    grid_g_per_kwh: Sourced[NonNegative] | Literal["unknown"] = UNKNOWN
    renewable_share: Sourced[Share] | Literal["unknown"] = UNKNOWN
    yen_per_kwh: Sourced[NonNegative] | Literal["unknown"] = UNKNOWN
    yen_per_gpu_hour: Sourced[NonNegative] | Literal["unknown"] = UNKNOWN


class Site(Section):
    """The figures that a plan is made with. The defaults are assumptions: national figures of Japan.

    Attributes:
        name: For people.
        power_w: What the site may draw in all; 0: no limit is known.
        pue: Facility power over IT power: METI's benchmark of at most 1.4 by FY2030 by default.
        grid_g_per_kwh: CO2 of the grid: Japan's lifecycle figure of 2023 by default (Our World in Data).
        yen_per_kwh: Electricity.
        yen_per_gpu_hour: All other cost of a GPU.
        mtbf_gpu_hours: Hours of one GPU between interruptions of the job. Llama 3 405B: 419 unexpected ones
            in 54 days on 16,384 H100 (arXiv 2407.21783, section 3.3.4).
        restart_s: From a failure to the first new step.
        checkpoint_bytes_per_s: Written by the ranks of one GPU, side by side.
        assumed: Figures above that no source states for the site.
    """

    name: str = "Japan"
    power_w: NonNegative = 0.0
    pue: Pue = 1.4
    grid_g_per_kwh: NonNegative = 485.0
    yen_per_kwh: NonNegative = 20.0
    yen_per_gpu_hour: NonNegative = 300.0
    mtbf_gpu_hours: Positive = 50_700.0
    restart_s: NonNegative = 600.0
    checkpoint_bytes_per_s: Positive = 250e6
    assumed: tuple[str, ...] = ("pue", "grid_g_per_kwh", "yen_per_kwh", "yen_per_gpu_hour")


def load_site(name: str | None) -> Site:
    """A site to plan for, by name or file; None is Japan's averages.

    Raises:
        InputError: There is no such site, or its file is wrong.
    """
    if name is None:
        return Site()
    file = read_site_file(name)
    stated = {
        key: figure.value
        for key in ("power_w", *Site().assumed)
        if isinstance(figure := getattr(file, key), Sourced)
    }
    assumed = tuple(key for key in Site().assumed if key not in stated)
    return Site(name=file.name, assumed=assumed, **stated)


def read_site_file(name: str) -> SiteFile:
    """What is known of a site, by name or file.

    Raises:
        InputError: There is no such site, or its file is wrong.
    """
    folder = Path(str(resources.files("moe.planner"))) / "sites"
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    path = known.get(name, Path(name))
    if not path.is_file():
        raise InputError(f"--site {name}: no such file; known: {', '.join(known)}")
    try:
        return SiteFile.model_validate(ConfigTree(path).values)
    except ValidationError as error:
        raise InputError(f"--site {name}: {_problems(error)}") from error


def _problems(error: ValidationError) -> str:
    """One sentence a figure; of a figure that is neither form, what is wrong with {value, source}."""
    found: dict[str, str] = {}
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        if "literal['unknown']" in location:
            continue
        key, inner = location[0], "".join(f".{part}" for part in location[1:] if "[" not in part)
        said = f"got {problem['input']!r}" if problem["type"] == "model_type" else problem["msg"]
        found[key] = f"{key}{inner}: {said}"
    return "; ".join(found.values()) + "; a figure is {value: NUMBER, source: TEXT} or unknown"
