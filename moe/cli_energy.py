"""The verbs of `moe energy`. Heavy imports happen inside them, so that help answers at once."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from moe.cli_shared import AsJson, epilog, note

REPORT_EXAMPLE = "moe energy report runs/quickstart --site tomakomai --html report.html"
SWEEP_EXAMPLE = "moe energy sweep c.yaml --power-caps 400:700:50 --allow-power-changes"
CLOCK_EXAMPLE = "moe energy clock-plan plan.json --out clocks.json"
HOLD_EXAMPLE = "moe energy hold-clock c.json --stage 0 --gpu-uuid U --allow-power-changes"

energy_app = typer.Typer(
    help="Account for energy, and lower it.",
    epilog=epilog(REPORT_EXAMPLE),
    no_args_is_help=True,
    rich_markup_mode=None,
)


Allow = Annotated[
    bool, typer.Option("--allow-power-changes", help="Change settings of the GPUs, and put them back.")
]
Slowdown = Annotated[str, typer.Option(help="Loss of speed that is allowed, such as 3%.")]


@energy_app.command(epilog=epilog(REPORT_EXAMPLE))
def report(
    run_dirs: Annotated[
        list[Path], typer.Argument(exists=True, file_okay=False, help="Folders of runs, killed ones too.")
    ],
    site: Annotated[str, typer.Option(help="tomakomai, sakai, or a site file; see configs/sites.")],
    *,
    hourly_factors: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="CSV of the grid by the hour; see moe/energy/carbon.py."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the entries to this file.")] = None,
    html: Annotated[Path | None, typer.Option(dir_okay=False, help="Write a page to print and file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Account for runs at a site.

    kWh, yen, PUE, location-based carbon and renewable share, for each start, each run and in all. What no
    source states is `unknown`, and so is what would follow from it.
    """
    from moe.durable import write_atomically
    from moe.energy.ledger import make_ledger
    from moe.energy.ledger_page import as_object, as_text, csv_text, html_text

    ledger = make_ledger(run_dirs, site=site, hourly_factors=hourly_factors)
    typer.echo(json.dumps(as_object(ledger), ensure_ascii=False) if as_json else as_text(ledger))
    if csv is not None:
        write_atomically(csv, csv_text(ledger))
        note(f"csv: {csv}")
    if html is not None:
        today = datetime.datetime.now(datetime.UTC).date()
        write_atomically(html, html_text(ledger, today=today))
        note(f"page: {html}")


@energy_app.command(epilog=epilog(SWEEP_EXAMPLE))
def sweep(
    config: Annotated[Path, typer.Argument(help="A YAML recipe; see configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides.")] = None,
    *,
    power_caps: Annotated[str | None, typer.Option(help="Watts: 400,500 or FIRST:LAST:STEP.")] = None,
    clocks: Annotated[str | None, typer.Option(help="MHz, likewise, to be locked.")] = None,
    max_slowdown: Slowdown = "3%",
    allow_power_changes: Allow = False,
    as_json: AsJson = False,
) -> None:
    """Find the power cap or clock with the best tokens per joule.

    Trains while the settings change, on the GPUs of this machine. Needs an administrator's rights. The
    settings as found are put back at the end, at an error, at Ctrl-C and at SIGTERM; clocks, where --clocks
    changed them, to unlocked: a lock that was there before is lost.
    """
    from moe.energy.sweep_command import run_sweep

    found = run_sweep(
        config,
        overrides or [],
        power_caps=power_caps,
        clocks=clocks,
        max_slowdown=max_slowdown,
        allowed=allow_power_changes,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        note=note,
    )
    if found is not None:
        typer.echo(json.dumps(found.as_object()) if as_json else found.as_text())


@energy_app.command("clock-plan", epilog=epilog(CLOCK_EXAMPLE))
def clock_plan(
    source: Annotated[Path, typer.Argument(exists=True, help="A run folder, or output of moe plan --json.")],
    *,
    out: Annotated[Path, typer.Option(dir_okay=False, help="The plan file to write.")],
    gpu: Annotated[str, typer.Option(help="Whose power: h100, h200, b200, ... or a YAML file.")] = "h100",
    clocks: Annotated[str, typer.Option(help="MHz that can be locked: FIRST:LAST:STEP.")] = "990:1980:15",
    compute_share: Annotated[
        float, typer.Option(min=0.05, max=1, help="Part of a pass that slows down with the clock.")
    ] = 1.0,
    max_slowdown: Slowdown = "1%",
    as_json: AsJson = False,
) -> None:
    """Slow down pipeline stages that would only wait.

    Writes a plan and changes nothing; `moe energy hold-clock` applies it. A compute share of 1 is careful: a
    stage never gets slower than planned.
    """
    from moe.energy.clock_command import make_plan_file

    plan = make_plan_file(
        source, out, gpu=gpu, clocks=clocks, compute_share=compute_share, max_slowdown=max_slowdown
    )
    typer.echo(json.dumps(plan.as_object()) if as_json else plan.as_text())
    note(f"plan: {out}")


@energy_app.command("hold-clock", epilog=epilog(HOLD_EXAMPLE))
def hold_clock(
    plan: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A file of moe energy clock-plan.")
    ],
    *,
    stage: Annotated[int, typer.Option(min=0, help="Pipeline stage that the GPUs below work for.")],
    gpu_uuid: Annotated[list[str], typer.Option(help="A GPU of that stage; may be repeated.")],
    allow_power_changes: Allow = False,
) -> None:
    """Lock the clocks of a stage's GPUs until this command ends.

    Runs beside the job, with an administrator's rights. Ctrl-C or SIGTERM unlocks the clocks,
    also those that were locked before.
    """
    from moe.energy.clock_command import hold

    hold(plan, stage, gpu_uuid, allowed=allow_power_changes, note=note)
