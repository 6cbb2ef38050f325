"""Pictures of a run: loss, expert load, power. Drawn without a display, from the files of the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe.errors import InputError
from moe.metering.jsonl import EXPERT_LOAD_FILE, METRICS_FILE, read_step_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[dict[str, Any]]
Array = npt.NDArray[np.float64]

# From the Okabe-Ito palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
# One noisy step says little about balance: the heat map averages this share of the run, at its end.
LAST_SHARE = 0.2
# Up to this many experts, each gets its own tick.
MAX_TICKS = 32


def plot_run(run_dir: Path) -> list[Path]:
    """Draw every picture that the run folder has data for, into its folder `plots`.

    `loss.png` and `power.png` come from `metrics.jsonl`, `expert_load.png` from `expert_load.jsonl`. A run
    without energy readings gets no `power.png`, one without expert counts no `expert_load.png`.

    Returns:
        The files written.

    Raises:
        InputError: `metrics.jsonl` is missing, has no usable line or a broken one.
    """
    metrics_path = run_dir / METRICS_FILE
    metrics = read_step_log(metrics_path)
    if not any(isinstance(record.get("loss"), float) for record in metrics):
        raise InputError(f"{metrics_path} has no step with a loss; the run did not finish its first step")
    figures = {"loss.png": _loss_figure(metrics)}
    load_path = run_dir / EXPERT_LOAD_FILE
    if load_path.exists() and (loads := read_step_log(load_path)):
        figures["expert_load.png"] = _expert_load_figure(loads)
    if any(record.get("power_w") is not None for record in metrics):
        figures["power.png"] = _power_figure(metrics, energy_label=_energy_label(metrics[-1]))
    return [_save(figure, run_dir / "plots" / name) for name, figure in figures.items()]


def _loss_figure(metrics: Records) -> Figure:
    figure = _new_figure(8, 4.5)
    axes = figure.subplots()
    step, loss = _series(metrics, "step", "loss")
    axes.plot(step, loss, color=BLUE, linewidth=1.2, label="training loss")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    step, heldout = _series(metrics, "step", "heldout_loss")
    if step.size:
        axes.plot(step, heldout, "s", color=GREEN, markersize=5, label="held-out loss")
    step, bits = _series(metrics, "step", "heldout_bits_per_byte")
    if step.size:
        right = axes.twinx()
        # A scale of its own colour, so that no one reads bits off the loss axis.
        right.plot(step, bits, "o--", color=ORANGE, markersize=4, label="held-out bits per byte (right)")
        right.set_ylabel("bits per byte", color=ORANGE)
        right.tick_params(axis="y", colors=ORANGE)
        _frame(right, right_axis=True)
    _frame(axes)
    lines = [line for panel in figure.axes for line in panel.get_lines()]
    axes.legend(handles=lines, frameon=False, loc="upper right")
    return figure


def _expert_load_figure(loads: Records) -> Figure:
    """Left: load of each expert of each layer at the end. Right: each layer's busiest expert over time."""
    counts_SLE = np.asarray([record["counts"] for record in loads], dtype=np.float64)
    num_lines = max(1, round(LAST_SHARE * len(loads)))
    last_LE = _over_mean(counts_SLE[-num_lines:].sum(axis=0))
    num_layers, num_experts = last_LE.shape
    figure = _new_figure(11, min(max(3.5, 1.8 + 0.22 * num_layers), 8))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    # White is the even load on any run; what is twice it or more is equally dark.
    image = left.imshow(
        last_LE, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest", origin="lower"
    )
    figure.colorbar(image, ax=left, label="load / mean of the layer", extend="max")
    first_step = loads[-num_lines]["step"]
    left.set(
        xlabel="expert", ylabel="MoE layer", title=f"Expert load, steps {first_step} to {loads[-1]['step']}"
    )
    _integer_ticks(left.xaxis, num_experts)
    _integer_ticks(left.yaxis, num_layers)
    steps = [record["step"] for record in loads]
    worst_SL = np.stack([_over_mean(counts_LE).max(axis=1) for counts_LE in counts_SLE])
    right.fill_between(
        steps,
        worst_SL.min(axis=1),
        worst_SL.max(axis=1),
        color=BLUE,
        alpha=0.2,
        linewidth=0,
        label="all layers",
    )
    right.plot(steps, worst_SL.max(axis=1), color=BLUE, linewidth=1.2, label="worst layer")
    right.plot(steps, np.median(worst_SL, axis=1), color=ORANGE, linewidth=1.2, label="median layer")
    right.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    right.set(xlabel="step", ylabel="busiest expert / mean", title="Balance over time", ylim=(0, None))
    right.legend(frameon=False, loc="upper right")
    _frame(right)
    return figure


def _power_figure(metrics: Records, *, energy_label: str) -> Figure:
    figure = _new_figure(8, 5.5)
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(f"Power, {energy_label}")
    elapsed_s = _elapsed_s(metrics)
    power_w, tokens, energy_j = (_column(metrics, key) for key in ("power_w", "tokens", "energy_j"))
    upper.plot(elapsed_s, power_w, color=BLUE, linewidth=1.2, drawstyle="steps")
    upper.set(ylabel="power (W)", ylim=(0, None))
    with np.errstate(divide="ignore", invalid="ignore"):
        tokens_per_j = tokens / energy_j
    lower.plot(elapsed_s, np.where(energy_j > 0, tokens_per_j, np.nan), color=GREEN, linewidth=1.2)
    lower.set(xlabel="time in training (s)", ylabel="tokens per joule so far", ylim=(0, None))
    for axes in (upper, lower):
        _frame(axes)
    return figure


def _energy_label(record: dict[str, Any]) -> str:
    """Say how the energy was obtained, by the run's newest step."""
    source, validity = record.get("energy_source"), record.get("energy_validity")
    if source is None:
        return "source unknown"
    how = "ESTIMATED from a power model" if source == "estimated" else f"measured ({source}, {validity})"
    return f"{how}, boundary: {record['energy_boundary']}"


def _elapsed_s(metrics: Records) -> Array:
    """Seconds of training at the end of each step: its energy over its power, which is how power was made."""
    energy_j, power_w = _column(metrics, "energy_j"), _column(metrics, "power_w")
    step_j = np.diff(energy_j, prepend=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        step_s = step_j / power_w
    return np.cumsum(np.nan_to_num(step_s, nan=0.0, posinf=0.0, neginf=0.0))


def _over_mean(counts_LE: Array) -> Array:
    """Counts over their layer's mean; a layer without tokens stays at zero."""
    mean_L1 = counts_LE.mean(axis=1, keepdims=True)
    return counts_LE / np.where(mean_L1 > 0, mean_L1, 1.0)


def _column(records: Records, key: str) -> Array:
    """One field of all records; NaN where it is missing."""
    return np.asarray([np.nan if record.get(key) is None else record[key] for record in records], np.float64)


def _series(records: Records, x: str, y: str) -> tuple[Array, Array]:
    """Two fields of those records that have the second."""
    ys = _column(records, y)
    return _column(records, x)[np.isfinite(ys)], ys[np.isfinite(ys)]


def _integer_ticks(axis: Any, size: int) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator

    few = size <= MAX_TICKS
    axis.set_major_locator(FixedLocator(range(size)) if few else MaxNLocator(integer=True))


def _new_figure(width_in: float, height_in: float) -> Figure:
    # The object interface: pyplot would keep global state and look for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), layout="constrained")


def _frame(axes: Axes, *, right_axis: bool = False) -> None:
    axes.spines["top"].set_visible(False)
    axes.spines["right"].set_visible(right_axis)
    if not right_axis:
        axes.grid(visible=True, alpha=0.25, linewidth=0.6)


def _save(figure: Figure, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    partial = path.with_name(f".{path.name}")
    # The label of an estimate travels with the picture, also for programs.
    figure.savefig(partial, format="png", dpi=150, metadata={"Description": figure.get_suptitle()})
    partial.replace(path)
    return path
