"""The ledger as text, CSV and a page to print, in Japanese and English."""

from __future__ import annotations

import csv
import datetime
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from moe import __version__
from moe.energy.ledger import Entry, Ledger
from moe.planner.site import UNKNOWN, SiteFile, Sourced

UNKNOWN_BOTH = "不明 unknown"

# Names of a site's figures, and the factor and digits they are shown with.
_SITE_FIGURES = {
    "power_w": ("受電容量 (MW)", "Power available (MW)", 1e-6),
    "pue": ("PUE", "PUE", 1.0),
    "grid_g_per_kwh": ("排出係数・年間 (g-CO2/kWh)", "Grid factor of a year (g CO2/kWh)", 1.0),
    "renewable_share": ("再エネ比率・契約 (%)", "Renewable share by contract (%)", 100.0),
    "yen_per_kwh": ("電力単価 (円/kWh)", "Price (yen/kWh)", 1.0),
}
# Columns of the tables on the page: Japanese, English, key, digits.
_COLUMNS = (
    ("計測電力量 (kWh)", "Metered (kWh)", "metered_kwh", 6),
    ("有効電力量 (kWh)", "Useful (kWh)", "useful_kwh", 6),
    ("有効率 (%)", "Goodput (%)", "goodput_percent", 2),
    ("IT機器 (kWh)", "IT equipment (kWh)", "it_kwh", 6),
    ("施設 (kWh)", "Facility (kWh)", "facility_kwh", 6),
    ("電気料金 (円)", "Electricity (yen)", "yen", 2),
    ("CO2・計測分 (kg)", "CO2 of metered (kg)", "metered_co2_kg", 6),
    ("CO2・施設 (kg)", "CO2 of facility (kg)", "facility_co2_kg", 6),
    ("系統再エネ比率 (%)", "Grid renewable share (%)", "grid_renewable_percent", 1),
    ("トークン/J", "Tokens/J", "tokens_per_j", 2),
)
_METHOD_HOURLY = (
    "CO2はロケーション基準: 各時間の電力量 x その時間の系統排出係数。証書・契約は算入しない。",
    "CO2 is location-based: each hour's energy x the grid's factor of that hour; contracts do not count.",
)
_METHOD_YEARLY = (
    "CO2はロケーション基準: 電力量 x 系統排出係数(年間値)。時間別の係数は用いない。証書・契約は算入しない。",
    "CO2 is location-based: energy x one factor of the grid for a whole year; contracts do not count.",
)
_METHOD = (
    (
        "電力量は総量であり、待機電力を差し引かない。計測範囲(境界)と計測方法を各行に示す。",
        "Energy is gross: idle power is never subtracted. Each line names its boundary and its instrument.",
    ),
    (
        "施設電力量 = IT機器電力量 x PUE。IT機器電力量は学習記録(report.json)による。",
        "Facility energy = IT energy x PUE. IT energy is that of the run's report (report.json).",
    ),
    (
        "有効率 = 最終状態に至ったステップの電力量 / 全電力量(中断・再実行・評価・保存を含む)。",
        "Goodput = energy of steps that led to the final state / all energy, with kills, repeats, saves.",
    ),
    (
        "出典のない数値は「不明」とし、推測しない。",
        "A figure that no source states is `unknown`; nothing is guessed.",
    ),
)
_STYLE = """
@page { size: A4 landscape; margin: 12mm }
body { font: 10pt/1.45 "Noto Sans CJK JP", "Yu Gothic", sans-serif; color: #111; margin: 2em }
h1 { font-size: 15pt; margin: 0 } h2 { font-size: 11.5pt; margin: 1.4em 0 .4em }
h1 small, h2 small, th small { display: block; font-weight: normal; color: #444; font-size: .8em }
table { border-collapse: collapse; width: 100%; page-break-inside: avoid }
th, td { border: 1px solid #999; padding: .25em .5em; vertical-align: top; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tr.run td, tr.sum td { font-weight: bold } tr.sum td { border-top: 2px solid #111 }
.note { border: 2px solid #a00; padding: .5em 1em; margin-top: 1em } .unknown { color: #a00 }
"""


def as_rows(ledger: Ledger) -> list[dict[str, Any]]:
    """The entries as plain values, times in UTC; `unknown` where nothing is known."""
    return [_row(entry, ledger) for entry in ledger.entries]


def as_object(ledger: Ledger) -> dict[str, Any]:
    """The ledger as one JSON object."""
    factors = ledger.factors
    return {
        "site": ledger.site.model_dump(),
        "hourly_factors": UNKNOWN if factors is None else factors.source,
        "entries": as_rows(ledger),
        "notes": list(ledger.notes),
        "tool": f"moe {__version__}",
    }


def csv_text(ledger: Ledger) -> str:
    """One line an entry, and nothing else, so that a spreadsheet can read it."""
    rows = as_rows(ledger)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def as_text(ledger: Ledger) -> str:
    """Runs and their sum for a person."""
    lines = [f"{ledger.site.name}: PUE {_plain(ledger.site, 'pue')}, carbon by {_factor_source(ledger)}"]
    for row in as_rows(ledger):
        if row["kind"] == "start":
            continue
        name = row["run"] or "all runs"
        lines += [
            f"{name}: {_short(row['metered_kwh'])} kWh {row['energy']} at boundary {row['boundary']}, useful "
            f"{_short(row['useful_kwh'])} kWh (goodput {_short(row['goodput'])}), starts {row['starts']}",
            f"  facility {_short(row['facility_kwh'])} kWh, {_short(row['yen'])} yen, CO2 "
            f"{_short(row['facility_co2_kg'])} kg (of the metered part {_short(row['metered_co2_kg'])} kg), "
            f"renewable: grid {_short(row['grid_renewable_share'])}, "
            f"contract {_short(row['contract_renewable_share'])}",
        ]
    return "\n".join([*lines, *(f"note: {note}" for note in ledger.notes)])


def _row(entry: Entry, ledger: Ledger) -> dict[str, Any]:
    values = asdict(entry)
    for key in ("begin_s", "end_s"):
        moment = datetime.datetime.fromtimestamp(values.pop(key), datetime.UTC)
        values[f"{key.removesuffix('_s')}_utc"] = moment.isoformat(timespec="seconds")
    starts = [other for other in ledger.entries if other.kind == "start" and entry.run in (other.run, "")]
    values |= {
        "energy": "ESTIMATED" if "estimated" in entry.source else "measured",
        "starts": len(starts) if entry.kind != "start" else 1,
        "pue": _number(ledger.site, "pue"),
        "yen_per_kwh": _number(ledger.site, "yen_per_kwh"),
        "contract_renewable_share": _number(ledger.site, "renewable_share"),
        "carbon_factors": _factor_source(ledger),
        "site": ledger.site.name,
    }
    return {key: UNKNOWN if value is None else value for key, value in values.items()}


def _number(site: SiteFile, key: str) -> float | None:
    sourced = getattr(site, key)
    return float(sourced.value) if isinstance(sourced, Sourced) else None


def _plain(site: SiteFile, key: str) -> str:
    return _short(_number(site, key) or UNKNOWN)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,.4g}"


def _factor_source(ledger: Ledger) -> str:
    if ledger.factors is not None:
        return f"hour: {ledger.factors.source}"
    annual = ledger.site.grid_g_per_kwh
    return f"year: {annual.source}" if isinstance(annual, Sourced) else UNKNOWN


# ---- the page -----------------------------------------------------------------------------------------


def html_text(ledger: Ledger, *, today: datetime.date) -> str:
    """A page without anything from outside it, to be printed and filed."""
    rows = as_rows(ledger)
    whole = rows[-1]
    site = ledger.site
    parts = [
        "<!doctype html><html lang=ja><meta charset=utf-8>",
        f"<title>AI学習 エネルギー報告 {_text(site.name)}</title><style>{_STYLE}</style>",
        "<h1>AI学習 エネルギー・CO2報告書<small>Energy and CO2 report of AI training</small></h1>",
        _table(
            (
                ("拠点 Site", f"{site.name_ja} {site.name}".strip()),
                ("対象期間 Period (UTC)", f"{whole['begin_utc']} – {whole['end_utc']}"),
                ("作成日 Date", today.isoformat()),
                ("作成 Prepared with", f"JouleMoE {__version__}, moe energy report"),
                ("提出者 Submitted by", ""),
            )
        ),
        _notes(ledger.notes),
        _heading("1. 合計", "Total of all runs"),
        _entries([whole], with_starts=False),
        _heading("2. 学習ごと", "Runs"),
        _entries([row for row in rows if row["kind"] == "run"], with_starts=False),
        _heading("3. 起動ごと(中断・再開を含む)", "Starts, killed and resumed ones included"),
        _entries([row for row in rows if row["kind"] == "start"], with_starts=True),
        _heading("4. 拠点の数値と出典", "Figures of the site and their sources"),
        _site_table(ledger),
        _heading("5. 算定方法", "Method"),
        _method(ledger),
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _method(ledger: Ledger) -> str:
    carbon = _METHOD_YEARLY if ledger.factors is None else _METHOD_HOURLY
    items = "".join(f"<li>{_text(ja)}<br>{_text(en)}</li>" for ja, en in (*_METHOD, carbon))
    return f"<ol>{items}</ol>"


def _heading(japanese: str, english: str) -> str:
    return f"<h2>{_text(japanese)}<small>{_text(english)}</small></h2>"


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{_text(note)}</li>" for note in notes)
    return f"<div class=note><b>注意事項 Notes</b><ul>{items}</ul></div>"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _entries(rows: Sequence[Mapping[str, Any]], *, with_starts: bool) -> str:
    names = [("学習", "Run"), ("計測", "Metering"), *(column[:2] for column in _COLUMNS)]
    head = "".join(f"<th>{_text(ja)}<small>{_text(en)}</small></th>" for ja, en in names)
    body = "".join(_entry_row(row, with_starts=with_starts) for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _entry_row(row: Mapping[str, Any], *, with_starts: bool) -> str:
    name = row["run"] or "合計 all"
    if with_starts:
        name = f"{name} #{row['start']}\n{row['begin_utc']}"
    estimated = "推定 ESTIMATED" if row["energy"] == "ESTIMATED" else "計測 measured"
    metering = f"{estimated}, {row['source']}, 境界 boundary {row['boundary']}, {row['validity']}"
    percents = {
        "goodput_percent": _percent(row["goodput"]),
        "grid_renewable_percent": _percent(row["grid_renewable_share"]),
    }
    numbers = "".join(_cell({**row, **percents}[key], digits) for _, _, key, digits in _COLUMNS)
    title = _text(name).replace("\n", "<br>")
    return f"<tr class={row['kind']}><td>{title}</td><td>{_text(metering)}</td>{numbers}</tr>"


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, str):
        return f"<td class='number unknown'>{UNKNOWN_BOTH}</td>"
    return f"<td class=number>{value:,.{digits}f}</td>"


def _percent(share: Any) -> Any:
    return share if isinstance(share, str) else 100 * share


def _site_table(ledger: Ledger) -> str:
    rows = []
    for key, (japanese, english, factor) in _SITE_FIGURES.items():
        sourced = getattr(ledger.site, key)
        known = isinstance(sourced, Sourced)
        value = f"{sourced.value * factor:,.4g}" if known else UNKNOWN_BOTH
        source = sourced.source if known else ""
        rows.append(
            f"<tr><th>{_text(japanese)}<small>{_text(english)}</small></th>"
            f"<td class={'number' if known else 'unknown'}>{value}</td><td>{_text(source)}</td></tr>"
        )
    rows.append(
        "<tr><th>CO2排出係数の出典<small>Source of the CO2 factors</small></th>"
        f"<td colspan=2>{_text(_factor_source(ledger))}</td></tr>"
    )
    return f"<table><tr><th></th><th>値 Value</th><th>出典 Source</th></tr>{''.join(rows)}</table>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
