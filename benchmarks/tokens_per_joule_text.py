"""What the benchmark prints: one line a result, each with what its joules are."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.tokens_per_joule_record import (
    AgainstRecord,
    EnergyFigure,
    EnergyLabel,
    Estimate,
    Leg,
    Record,
    Summary,
    TargetLoss,
    TargetLossAgainst,
    TargetLossSummary,
)


def as_text(records: Sequence[Record]) -> str:
    """All results for a person."""
    lines: list[str] = []
    for record in records:
        match record:
            case Summary():
                lines += summary_lines(record)
            case AgainstRecord():
                lines.append(verdict_line(record))
            case TargetLossSummary():
                lines.append(target_line(record))
            case TargetLossAgainst():
                lines.append(target_verdict_line(record))
    return "\n".join([*lines, *_machine_lines(records), f"idle power, included: {idle(records)}"])


def summary_lines(summary: Summary) -> list[str]:
    """Three lines: who, how efficient, of what."""
    bound = "forced balance, an UPPER BOUND" if summary.is_upper_bound else "natural routing"
    peak = "".join(f", {share.percent:.1f} % of {share.basis}" for share in summary.of_peak)
    return [
        f"{summary.role}: {summary.name} ({bound}, {summary.mode} windows{capped(summary.power_cap_w)})",
        f"   {interval(summary.tokens_per_j)} tokens/J, {meaning(summary.energy)}",
        f"   {interval(summary.active_param_tokens_per_j)} active-parameter tokens/J, "
        f"{interval(summary.model_flop_per_j)} model FLOP/J{peak}, "
        f"{interval(summary.tokens_per_s)} tokens/s",
    ]


def verdict_line(record: AgainstRecord) -> str:
    """The verdict with its interval."""
    least = f"; differences below {record.resolution:.2%} are the meter's" if record.resolution else ""
    return (
        f"tokens/J of a over b: {interval(record.ratio)}, 95 % interval of {record.ratio.repeats} pairs, "
        f"drift {record.drift_per_leg:+.2%} a leg{least}: a is {record.verdict.upper()} against b "
        f"({meaning(record.energy)}{capped(record.power_cap_w)})"
    )


def target_verdict_line(record: TargetLossAgainst) -> str:
    """The verdict on the joules to a loss; seeds train without caps of ours, whatever --power-caps says."""
    return (
        f"joules of b over a to loss {record.target_loss:g}: {interval(record.ratio)}: "
        f"a is {record.verdict.upper()} against b ({meaning(record.energy)}, no power cap set)"
    )


def target_line(record: TargetLossSummary) -> str:
    """Joules to a loss, or that it was not reached."""
    head = f"{record.role}: {record.name}: held-out loss {record.target_loss:g}"
    if record.joules is None:
        return f"{head} was reached by {record.reached} of {record.seeds} seeds only; give more train.steps"
    return f"{head} after {interval(record.joules)} J over {record.seeds} seeds, {meaning(record.energy)}"


def interval(estimate: Estimate) -> str:
    """A mean with its interval in brackets."""
    if estimate.ci95_low is None or estimate.ci95_high is None:
        return f"{estimate.mean:.4g}"
    return f"{estimate.mean:.4g} [{estimate.ci95_low:.4g}, {estimate.ci95_high:.4g}]"


def capped(power_cap_w: float | None) -> str:
    """The power limit that the benchmark set, behind a comma; nothing where it set none."""
    return "" if power_cap_w is None else f", power cap {power_cap_w:g} W"


def idle(records: Sequence[Record]) -> str:
    """Power before the work began, by what the meters of these records say."""
    figures = [record.energy for record in records if isinstance(record, Leg | TargetLoss)]
    known = [figure.idle_w for figure in figures if figure.idle_w is not None]
    if not known:
        return "not known"
    low, high = f"{min(known):.4g}", f"{max(known):.4g}"
    return f"{low} W" if low == high else f"{low} to {high} W"


def meaning(energy: EnergyLabel | EnergyFigure) -> str:
    """Where joules come from and what they include."""
    how = "ESTIMATED, not measured" if energy.source == "estimated" else f"measured ({energy.source})"
    validity = "" if energy.source == "estimated" else f", {energy.validity}"
    return f"{how}{validity}, boundary {energy.boundary}"


def _machine_lines(records: Sequence[Record]) -> list[str]:
    leg = next((record for record in records if isinstance(record, Leg)), None)
    if leg is None:
        return []
    machine = leg.machine
    limits = machine.power_limit_w
    power = "not read" if limits is None else ", ".join(sorted({f"{limit:g} W" for limit in limits}))
    unsettled = sum(1 for each in records if isinstance(each, Leg) and not each.settled)
    warning = [f"NOT SETTLED before the window: {unsettled} legs"] if unsettled else []
    return [
        f"both with {' '.join(leg.work.overrides)}" if leg.work.overrides else "both as in the recipe",
        f"{machine.device}, {machine.ranks} ranks; power limit in force: {power}; {leg.energy.description}",
        *warning,
    ]
