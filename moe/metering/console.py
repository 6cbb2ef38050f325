"""What a person sees while a run goes on: a live bar in a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from moe.metering.report import Energy, Report
from moe.metering.throughput import StepClock


class ConsoleSink:
    """Shows loss, tokens/s, expert balance, watts, tokens/J and the time left.

    An estimate of energy is called one each time it is shown.
    """

    def __init__(
        self,
        *,
        estimated: bool,
        log_interval: int = 1,
        done_steps: int = 0,
        console: Console | None = None,
    ) -> None:
        """Make the sink.

        Args:
            estimated: Energy comes from a power model, not from a meter.
            log_interval: Steps between plain lines; a terminal shows every step.
            done_steps: Steps of an earlier start of the run.
            console: Where to write; None is standard output.
        """
        self._console = console or Console(highlight=False)
        self._estimated = estimated
        self._log_interval = log_interval
        self._done_steps = done_steps
        self._tokens: int | None = None
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn()
        )
        self._live: Live | None = None

    def start(self, config: Mapping[str, Any], total_steps: int) -> None:
        """Begin; the clock of the time left starts now."""
        self._total_steps = total_steps
        self._clock = StepClock(total_steps - self._done_steps)
        if self._console.is_terminal:
            self._task = self._progress.add_task("training", total=total_steps, completed=self._done_steps)
            self._live = Live(self._progress, console=self._console, refresh_per_second=4)
            self._live.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Show one step."""
        step = int(record["step"] or 0)
        eta_s = self._clock.tick(tokens=0).eta_s
        status = status_line(record, eta_s=eta_s, estimated=self._estimated)
        if self._live is not None:
            self._progress.update(self._task, completed=step)
            self._live.update(Group(self._progress, Text(status, overflow="fold")))
        elif step % self._log_interval == 0 or step == self._total_steps:
            self._print(f"step {step}/{self._total_steps}  {status}")
        if record.get("heldout_loss") is not None:
            self._print(f"step {step}/{self._total_steps}  {_heldout(record)}")

    def note(self, text: str) -> None:
        """Show a message, above the bar if there is one."""
        self._print(text)

    def finish(self, report: Report | None) -> None:
        """End the bar and show what the run came to; `report` is None if it did not reach its end."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if report is not None:
            self._print(summary(report))

    def _print(self, text: str) -> None:
        # soft_wrap: a log file must not be broken at 80 columns. No markup: a path may contain brackets.
        self._console.print(text, markup=False, soft_wrap=True)


def status_line(record: Mapping[str, Any], *, eta_s: float, estimated: bool) -> str:
    """Return one step of `metrics.jsonl` as a line for a person; what was not measured is left out."""
    parts = [
        _format("loss {:.4f}", record.get("loss")),
        _format("{:,.0f} tokens/s", record.get("tokens_per_s")),
        _format("balance {:.2f}", record.get("expert_load_max_over_mean")),
        _format("logit {:,.1f}", record.get("max_attention_logit")),
        _format("~{:,.0f} W est." if estimated else "{:,.0f} W", record.get("power_w")),
        _format(_tokens_per_j(estimated), record.get("tokens_per_j")),
        "ENERGY INVALID" if record.get("energy_validity") == "invalid" else "",
        f"ETA {timedelta(seconds=round(eta_s))}",
    ]
    return "  ".join(part for part in parts if part)


def summary(report: Report) -> str:
    """Return a finished run in a few lines for a person."""
    lines = [
        f"{report.run}: {report.steps:,} steps, {report.tokens:,} tokens in "
        f"{timedelta(seconds=round(report.wall_s))} on {report.device}",
        _format("training loss {:.4f}", report.loss_first) + _format(" -> {:.4f}", report.loss_last),
        _heldout(report.model_dump()),
        f"{report.tokens_per_s:,.0f} tokens/s",
        _energy(report.energy, report.tokens_per_j),
        _goodput(report),
    ]
    return "\n".join(line for line in lines if line)


def _energy(energy: Energy, tokens_per_j: float | None) -> str:
    estimated = energy.source == "estimated"
    joules = _format("~{:,.0f} J est." if estimated else "{:,.0f} J", energy.total_j)
    if not joules:
        return "energy unknown: the meter failed during the run"
    if energy.validity == "invalid":
        return f"{joules}  boundary {energy.boundary}  INVALID, not to be quoted: {energy.validity_detail}"
    efficiency = _format(_tokens_per_j(estimated), tokens_per_j)
    return f"{joules}  {efficiency}  boundary {energy.boundary}  {energy.validity}"


def _goodput(report: Report) -> str:
    share = _format("{:.1%} of the joules in steps that count", report.campaign.goodput)
    return f"{share}, over {report.campaign.starts} start(s)" if share else ""


def _heldout(record: Mapping[str, Any]) -> str:
    loss = _format("held-out loss {:.4f}", record.get("heldout_loss"))
    return loss + _format(", {:.4f} bits per byte", record.get("heldout_bits_per_byte"))


def _tokens_per_j(estimated: bool) -> str:
    return "{:,.3g} tokens/J (estimated)" if estimated else "{:,.3g} tokens/J"


def _format(template: str, value: float | None) -> str:
    return "" if value is None else template.format(value)
