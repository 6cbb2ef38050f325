"""What `moe plan` does: one request in, one text out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe.errors import InputError
from moe.planner.hardware_file import find_gpu
from moe.planner.plan import Plan, as_json, make_plan
from moe.planner.report import plan_text, search_text, validation_text, what_if_text
from moe.planner.search import Found, Objective, as_overrides, search
from moe.planner.settings import PlanConfig, load_plan_config, make_job, searched_job
from moe.planner.site import Site, load_site
from moe.planner.validate import Comparison, compare_all, published_rows, summary, validate

OBJECTIVES = ("time", "tokens_per_j")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `moe plan`.

    Attributes:
        config: A recipe.
        overrides: Of its keys and of plan.*.
        gpus: How many.
        gpu: Of which kind.
        search: Try all layouts.
        objective: What the search ranks by.
        what_if: Overrides to try one by one.
        site: Name or file of a site.
        png: Folder for pictures; None draws none.
        validate: Compare with published runs instead; needs no config.
    """

    config: Path | None
    overrides: Sequence[str]
    gpus: int
    gpu: str
    search: bool = False
    objective: str = "time"
    what_if: Sequence[str] = ()
    site: str | None = None
    png: Path | None = None
    validate: bool = False


def run_request(request: Request, *, as_object: bool) -> str:
    """Plan, search, compare, draw; text for people, or one JSON object.

    Raises:
        InputError: Something in the request is wrong, or no layout fits.
    """
    return _validation(as_object=as_object) if request.validate else _planned(request, as_object=as_object)


def _planned(request: Request, *, as_object: bool) -> str:
    site, config = load_site(request.site), _config(request, ())
    found = _search(config, request, site) if request.search else None
    plan = found.best if found else _plan(config, request, site)
    others = [(change, _changed(request, config, plan, change)) for change in request.what_if]
    pictures = _draw(plan, found, request.png)
    if as_object:
        return json.dumps(_object(config, plan, found, others) | _pictures(pictures))
    parts = [search_text(found) if found else plan_text(plan)]
    if others:
        parts.append(what_if_text(plan, others))
    return "\n".join([*parts, *map(str, pictures)])


def _validation(*, as_object: bool) -> str:
    """Rerun the published table."""
    comparisons, rows = compare_all(), published_rows()
    if not as_object:
        return validation_text(comparisons, rows)
    held_out, examined = (
        tuple(one for one in comparisons if one.row.table == table) for table in ("held_out", "examined")
    )
    return json.dumps(
        {
            "rows": [_as_object(one) for one in validate()],
            "rows_assuming": [_as_object(one) for one in comparisons if one.row.assumes],
            "rows_held_out": [_as_object(one) for one in held_out],
            "rows_examined": [_as_object(one) for one in examined],
            "not_rerun": [{"id": row.id, "missing": row.missing} for row in rows if row.missing],
            "summary": summary(validate()),
            "summary_held_out": summary(held_out),
            "summary_examined": summary(examined),
        }
    )


def _as_object(comparison: Comparison) -> dict[str, Any]:
    return {
        "id": comparison.row.id,
        "source": comparison.row.source,
        "assumes": comparison.row.assumes or None,
        "measured_step_s": comparison.measured_s,
        "step_s": comparison.planned_s,
        "step_error": comparison.step_error,
        "measured_memory_gib": comparison.row.memory_gib or None,
        "memory_gib_worst_rank": comparison.planned_gib,
        "memory_error": comparison.memory_error,
        "short_gib": comparison.short_gib,
        "repeats": comparison.row.repeats or None,
    }


def _config(request: Request, more: Sequence[str]) -> PlanConfig:
    """The recipe with the request's overrides and some more."""
    if request.config is None:
        raise InputError("moe plan needs a config, for example configs/quickstart.yaml, or --validate")
    return load_plan_config(request.config, [*request.overrides, *more])


def _plan(config: PlanConfig, request: Request, site: Site) -> Plan:
    job = make_job(config, request.gpus, find_gpu(request.gpu))
    return make_plan(job, config.train.steps, site, engine=config.engine.name)


def _search(config: PlanConfig, request: Request, site: Site) -> Found:
    objective: Objective = "time" if request.objective == "time" else "tokens_per_j"
    if request.objective not in OBJECTIVES:
        raise InputError(f"--objective {request.objective}: allowed: {', '.join(OBJECTIVES)}")
    base = searched_job(config, request.gpus, find_gpu(request.gpu))
    return search(config, base, site=site, objective=objective)


def _changed(request: Request, config: PlanConfig, plan: Plan, change: str) -> Plan:
    """The plan with one more override, in the layout that was planned."""
    return _plan(_config(request, [*as_overrides(config, plan.job), change]), request, plan.site)


def _draw(plan: Plan, found: Found | None, folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    from moe.planner.plots import draw_plan

    try:
        return draw_plan(plan, found.front if found else (), folder)
    except OSError as error:
        raise InputError(f"--png {folder} cannot be written: {error.strerror or error}") from error


def _object(
    config: PlanConfig, plan: Plan, found: Found | None, others: Sequence[tuple[str, Plan]]
) -> dict[str, Any]:
    values = as_json(plan)
    if found:
        values["search"] = {
            "overrides": found.overrides,
            "tried": found.tried,
            "fitting": found.fitting,
            "front": [_brief(config, one) for one in found.front],
            "neighbours": [asdict(neighbour) for neighbour in found.neighbours],
            "refused_by_train": found.refused,
        }
    if others:
        values["what_if"] = [{"override": change, **_brief(config, other)} for change, other in others]
    return values


def _pictures(paths: Sequence[Path]) -> dict[str, Any]:
    return {"pictures": [str(path) for path in paths]} if paths else {}


def _brief(config: PlanConfig, plan: Plan) -> dict[str, Any]:
    full = as_json(plan)
    keys = ("layout", "step_s", "tokens_per_s_per_gpu", "memory_gib_worst_rank", "tokens_per_j", "fits")
    return {"overrides": as_overrides(config, plan.job), **{key: full[key] for key in keys}}
