"""The benchmark's result as one page: HTML without anything from outside it, and its picture as a PNG."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.ab_statistics import CONFIDENCE
from benchmarks.tokens_per_joule_record import (
    AgainstRecord,
    Leg,
    Record,
    Summary,
    TargetLossAgainst,
)
from benchmarks.tokens_per_joule_summary import METHOD
from benchmarks.tokens_per_joule_text import as_text, capped, idle, interval, meaning
from moe.durable import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From the Okabe-Ito palette, which colour-blind readers can tell apart.
COLOURS = {"a": "#0072B2", "b": "#D55E00"}
_STYLE = """
@page { size: A4; margin: 14mm }
body { font: 10.5pt/1.45 system-ui, sans-serif; color: #111; max-width: 60em; margin: 2em auto }
h1 { font-size: 16pt } img { width: 100% } pre { white-space: pre-wrap; background: #f4f4f4; padding: 1em }
table { border-collapse: collapse; width: 100% }
th, td { border: 1px solid #999; padding: .25em .5em; text-align: left }
.verdict { font-size: 12pt; border-left: 4px solid #111; padding: .3em 1em }
"""


def write_page(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write tokens_per_joule.html and tokens_per_joule.png into a folder; return both paths."""
    picture = _png(draw(records))
    paths = [folder / "tokens_per_joule.html", folder / "tokens_per_joule.png"]
    write_atomically(paths[0], page(records, picture))
    write_atomically(paths[1], picture)
    return paths


def page(records: Sequence[Record], picture: bytes) -> str:
    """The page, with the picture inside it."""
    legs = [record for record in records if isinstance(record, Leg)]
    summaries = [record for record in records if isinstance(record, Summary)]
    verdicts = [record for record in records if isinstance(record, AgainstRecord | TargetLossAgainst)]
    image = base64.b64encode(picture).decode()
    rows = "".join(_row(summary) for summary in summaries)
    said = "".join(f"<p class=verdict>{html.escape(_verdict(verdict))}</p>" for verdict in verdicts)
    when = f"{legs[0].time}, commit {legs[0].software.commit}" if legs else ""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Tokens per joule</title>"
        f"<style>{_STYLE}</style><h1>Tokens per joule</h1><p>{html.escape(when)}</p>{said}"
        f"<img alt='Tokens per joule of each leg' src='data:image/png;base64,{image}'>"
        "<table><tr><th>config</th><th>routing</th><th>tokens/J</th><th>active-parameter tokens/J</th>"
        f"<th>model FLOP/J</th><th>energy</th></tr>{rows}</table>"
        f"<h2>All results</h2><pre>{html.escape(as_text(records))}</pre>"
        f"<h2>Method</h2><p>Gross energy, idle power ({idle(records)}) included. {html.escape(METHOD)}. "
        f"Intervals are {CONFIDENCE:.0%}.</p></html>\n"
    )


def _row(summary: Summary) -> str:
    routing = "forced balance: upper bound" if summary.is_upper_bound else "natural"
    cells = (
        f"{summary.role}: {summary.name}",
        f"{routing}{capped(summary.power_cap_w)}",
        interval(summary.tokens_per_j),
        interval(summary.active_param_tokens_per_j),
        interval(summary.model_flop_per_j),
        meaning(summary.energy),
    )
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _verdict(record: AgainstRecord | TargetLossAgainst) -> str:
    said = f"{record.a} is {record.verdict.upper()} against {record.b}: "
    if isinstance(record, AgainstRecord):
        times, cap = f"{interval(record.ratio)} times its tokens/J", capped(record.power_cap_w)
    else:
        times = f"to loss {record.target_loss:g} the other takes {interval(record.ratio)} times its joules"
        cap = ", no power cap set"
    return f"{said}{times} ({meaning(record.energy)}{cap})"


def draw(records: Sequence[Record]) -> Figure:
    """Left: each leg in the order in which they ran. Right: means with their intervals."""
    # The object interface: pyplot would keep global state and look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_legs(left, [record for record in records if isinstance(record, Leg)])
    _draw_means(right, [record for record in records if isinstance(record, Summary)])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, alpha=0.25, linewidth=0.6)
    return figure


def _draw_legs(axes: Axes, legs: Sequence[Leg]) -> None:
    # Whatever the power cap, each leg has its own place; those that ended in one second, by their order.
    in_time = sorted(legs, key=lambda leg: (leg.time, leg.is_upper_bound, leg.repeat, leg.role))
    places = list(enumerate(in_time, start=1))
    for role in ("a", "b"):
        for forced, marker in ((False, "o"), (True, "^")):
            chosen = [(at, leg) for at, leg in places if (leg.role, leg.is_upper_bound) == (role, forced)]
            if chosen:
                label = f"{role}, forced balance (upper bound)" if forced else f"{role}, natural routing"
                axes.plot(
                    [at for at, _ in chosen],
                    [leg.tokens_per_j for _, leg in chosen],
                    marker,
                    color=COLOURS[role],
                    label=label,
                    fillstyle="none" if forced else "full",
                )
    estimated = any(leg.energy.source == "estimated" for leg in legs)
    title = "Legs, in the order of time" + (", joules ESTIMATED" if estimated else "")
    joules = "\n".join(dict.fromkeys(meaning(leg.energy) for leg in legs))
    axes.set(xlabel="leg", ylabel=f"tokens per joule\n{joules}", title=title)
    if legs:
        axes.legend(frameon=False)


def _draw_means(axes: Axes, summaries: Sequence[Summary]) -> None:
    names = []
    for at, summary in enumerate(summaries):
        found = summary.tokens_per_j
        spread = None
        if found.ci95_low is not None and found.ci95_high is not None:
            spread = [[found.mean - found.ci95_low], [found.ci95_high - found.mean]]
        fill = "none" if summary.is_upper_bound else "full"
        axes.errorbar(
            [found.mean], [at], xerr=spread, fmt="o", capsize=4, color=COLOURS[summary.role], fillstyle=fill
        )
        cap = "" if summary.power_cap_w is None else f"\n{summary.power_cap_w:g} W"
        names.append(f"{summary.role}, {'forced' if summary.is_upper_bound else 'natural'}{cap}")
    axes.set(xlabel="tokens per joule, mean and 95 % interval", title="Means")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
