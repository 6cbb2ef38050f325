"""Looks for the power cap or clock with the best tokens per joule at a loss of speed that the user allows.

One training goes on while the setting changes under it: each setting gets a steady window (steady_state.py),
first those as found, then the grid there and back again, so that a machine that warms up favours none.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from moe.config.schema import RunConfig
from moe.energy.grid import AS_FOUND, Setting
from moe.energy.power_control import PowerControl, open_nvml
from moe.energy.steady_state import Rule, SteadyWindow
from moe.energy.watch import Machines, Watch
from moe.errors import InputError
from moe.metering.energy import EnergyMeterError


@dataclass(frozen=True)
class Point:
    """What a setting gives; geometric means over its windows."""

    setting: Setting
    tokens_per_s: float
    tokens_per_j: float


@dataclass(frozen=True)
class Swept:
    """What the sweep found.

    Attributes:
        points: One a setting, that as found first.
        best: Most tokens per joule among those that are fast enough; the one as found if no other is.
        max_slowdown: Share of speed that was allowed to be lost.
        source: How the joules were obtained.
        boundary: What they include.
    """

    points: tuple[Point, ...]
    best: Point
    max_slowdown: float
    source: str
    boundary: str

    def as_object(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def as_text(self) -> str:
        """A line a setting, then the best."""
        how = "ESTIMATED" if self.source == "estimated" else f"measured ({self.source})"
        lines = [
            f"{point.setting!s:>10}: {point.tokens_per_s:,.0f} tokens/s, {point.tokens_per_j:.4g} tokens/J"
            for point in self.points
        ]
        found = self.points[0]
        gain = self.best.tokens_per_j / found.tokens_per_j - 1
        speed = self.best.tokens_per_s / found.tokens_per_s - 1
        best = f"best with at most {self.max_slowdown:.1%} less speed: {self.best.setting}"
        return "\n".join(
            [*lines, f"{best}: {gain:+.1%} tokens/J at {speed:+.1%} speed, {how}, boundary {self.boundary}"]
        )


class Control(Protocol):
    """What the sweep changes; see PowerControl."""

    def set_power_limit(self, watts: float) -> None:
        """Cap each GPU."""
        ...

    def lock_clock(self, mhz: int) -> None:
        """Lock the clock of each GPU."""
        ...

    def restore(self) -> None:
        """Put back what was found."""
        ...

    @property
    def undo_commands(self) -> list[str]:
        """What a person runs where this process could not put it back."""
        ...


class SweepWatch:
    """A watch of the training that changes the setting after each steady window."""

    def __init__(
        self, control: Control, grid: Sequence[Setting], *, rule: Rule, note: Callable[[str], None]
    ) -> None:
        """Begin with the setting as found.

        Args:
            control: Changes settings.
            grid: To be tried.
            rule: Of a window.
            note: Told about each window, and at the first change how to undo it.
        """
        self._control = control
        self._rule = rule
        self._note = note
        self._said_undo = False
        self._left = [AS_FOUND, *grid, *reversed(grid), AS_FOUND]
        self._found: dict[Setting, list[tuple[float, float]]] = {}
        self._window = SteadyWindow(rule)

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one step.

        Raises:
            EnergyMeterError: The meter failed.
        """
        if self.done:
            return
        self._window.log(record)
        window = self._window.window
        if window is None:
            return
        if window.energy_j is None or window.energy_j <= 0:
            raise EnergyMeterError(f"the meter gave no joules at {self._left[0]}")
        setting = self._left.pop(0)
        speed, efficiency = window.tokens / window.seconds, window.tokens / window.energy_j
        self._found.setdefault(setting, []).append((speed, efficiency))
        self._note(f"{setting}: {speed:,.0f} tokens/s, {efficiency:.4g} tokens/J")
        if self._left:
            self._apply(self._left[0])
            self._window = SteadyWindow(self._rule)

    @property
    def done(self) -> bool:
        """Whether every setting had its windows."""
        return not self._left

    @property
    def points(self) -> tuple[Point, ...]:
        """What was found so far."""
        return tuple(
            Point(setting, *(_geometric_mean(values) for values in zip(*pairs, strict=True)))
            for setting, pairs in self._found.items()
        )

    def _apply(self, setting: Setting) -> None:
        if setting.power_cap_w is not None:
            self._control.set_power_limit(setting.power_cap_w)
        elif setting.clock_mhz is not None:
            self._control.lock_clock(setting.clock_mhz)
        else:
            self._control.restore()
        if not self._said_undo and self._control.undo_commands:
            self._said_undo = True
            self._note("if this process is killed (SIGKILL), run: " + "; ".join(self._control.undo_commands))


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def best_point(points: Sequence[Point], max_slowdown: float) -> Point:
    """The most efficient of those that lose at most a share of the speed as found."""
    found = next(point for point in points if point.setting == AS_FOUND)
    fast = [point for point in points if point.tokens_per_s >= (1 - max_slowdown) * found.tokens_per_s]
    return max(fast, key=lambda point: point.tokens_per_j)


def sweep(
    config: RunConfig,
    grid: Sequence[Setting],
    *,
    rule: Rule,
    max_slowdown: float,
    allowed: bool,
    note: Callable[[str], None],
) -> Swept | None:
    """Train under each setting of a grid and put the settings back; collective. The result, on rank 0.

    Args:
        config: What is trained.
        grid: Settings to try.
        rule: Of a window.
        max_slowdown: Share of speed that may be lost, 0.03 for 3 %.
        allowed: The user asked for changes of the machine's settings.
        note: Takes messages for a person.

    Raises:
        InputError: `allowed` is false, rights are missing, there is no GPU, or train.steps are too few.
        EnergyMeterError: The meter failed, or the joules are not to be quoted.
    """
    from moe.energy.training_leg import train_watched

    watches: list[SweepWatch] = []
    with contextlib.ExitStack() as settings:

        def make_watch(machines: Machines) -> Watch:
            control = settings.enter_context(_control_of(machines, allowed=allowed))
            watches.append(SweepWatch(control, grid, rule=rule, note=note))
            return watches[0]

        # Settings go back before the engine closes, which waits for other ranks that may be gone.
        trained = train_watched(config, make_watch, note, before_close=settings.close)
    if trained is None:
        return None
    if trained.energy.validity == "invalid":
        raise EnergyMeterError(
            f"the energy of this sweep is not to be quoted: {trained.energy.validity_detail}"
        )
    watch = watches[0]
    if not watch.done:
        raise InputError(
            f"train.steps={config.train.steps} were over before every setting had its windows; give it more"
        )
    points = watch.points
    best = best_point(points, max_slowdown)
    return Swept(points, best, max_slowdown, trained.energy.source, trained.energy.boundary)


@contextlib.contextmanager
def _control_of(machines: Machines, *, allowed: bool) -> Iterator[PowerControl]:
    if not machines.own_gpu_uuids:
        raise InputError("a sweep changes power limits or clocks of GPUs; this job runs on none")
    if len(machines.hosts) > 1:
        raise InputError(f"a sweep reaches the GPUs of one machine, this job has {len(machines.hosts)}")
    with open_nvml() as nvml, PowerControl(nvml, machines.own_gpu_uuids, allowed=allowed) as control:
        yield control
