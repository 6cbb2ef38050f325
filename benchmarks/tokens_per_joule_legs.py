"""One leg of the tokens-per-joule benchmark: real training in a steady window, as a checked record."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.forced_balance import forced_balance
from benchmarks.harness import stamp
from benchmarks.peak_flop_per_joule import of_peak, precisions_in_use
from benchmarks.rendezvous import Rendezvous
from benchmarks.tokens_per_joule_record import FLOPS_CONVENTION, Leg, Machine, Work, check
from moe.config.load import dump_config
from moe.config.schema import RunConfig
from moe.energy.power_control import GpuState, open_nvml, read_states
from moe.energy.steady_state import Rule, SteadyWindow, Window
from moe.energy.training_leg import Trained, train_watched
from moe.energy.watch import Machines
from moe.errors import InputError
from moe.metering.energy import EnergyMeterError


@dataclass(frozen=True)
class Case:
    """One side of the comparison.

    Attributes:
        role: `a` or `b`.
        name: for people: the recipe, and what it has that the other side has not.
        path: the recipe as it was given.
        overrides: of its keys.
        config: what both give.
    """

    role: str
    name: str
    path: str
    overrides: tuple[str, ...]
    config: RunConfig


def uncapped(_watts: float) -> contextlib.AbstractContextManager[None]:
    """On a rank that changes no power limit."""
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Session:
    """What all legs of one call share; `capped` limits the power of this rank's machine."""

    run_id: str
    rule: Rule
    note: Callable[[str], None]
    rendezvous: Rendezvous
    capped: Callable[[float], contextlib.AbstractContextManager[None]] = uncapped
    _noted: set[str] = field(default_factory=set, init=False)

    def note_once(self, text: str) -> None:
        """Note what holds for every leg, at the first of them."""
        if text not in self._noted:
            self._noted.add(text)
            self.note(text)


def run_leg(
    case: Case, session: Session, *, repeat: int, forced: bool = False, power_cap_w: float | None = None
) -> Leg | None:
    """Train until the window is complete; collective. The record, on rank 0.

    Raises:
        InputError: train.steps are over before the window is.
        EnergyMeterError: the meter failed.
    """
    watch = _Watch(session)
    config = _without_evaluations(case.config)
    with forced_balance() if forced else contextlib.nullcontext(), contextlib.ExitStack() as settings:
        if power_cap_w is not None:
            settings.enter_context(session.capped(power_cap_w))
        # Limits go back before the engine closes, which waits for other ranks that may be gone.
        trained = train_watched(config, watch.on, session.note, before_close=settings.close)
    if trained is None:
        return None
    window = watch.steady.window
    if window is None:
        raise InputError(
            f"{case.name}: train.steps={case.config.train.steps} were over before the window of the "
            f"{session.rule.name} mode was complete; give it more, for example train.steps=5000"
        )
    if window.energy_j is None or not window.energy_j > 0:
        raise EnergyMeterError(f"{case.name}: the meter gave no joules for the window; see its message above")
    head = {
        "kind": "leg",
        "schema_version": 1,
        "run_id": session.run_id,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "mode": session.rule.name,
        "role": case.role,
        "repeat": repeat,
        "routing": "forced_balance" if forced else "natural",
        "is_upper_bound": forced,
        "power_cap_w": power_cap_w,
    }
    record = check(
        head
        | _window_values(window)
        | _efficiency(case.config, window, trained)
        | {
            "work": _work(case, trained).model_dump(),
            "machine": _machine(trained, watch.states).model_dump(),
            "software": {key: stamp("cpu")[key] for key in ("commit", "python", "torch", "triton")},
            "energy": energy_figure(trained, window.energy_j),
        }
    )
    assert isinstance(record, Leg)
    return record


def _without_evaluations(config: RunConfig) -> RunConfig:
    """The same training; an evaluation inside the window would cost time and joules without a token."""
    train = config.train.model_copy(update={"eval_interval": 0})
    return config.model_copy(update={"train": train})


class _Watch:
    """The steady window, and the state of the GPUs as it ends, while they are under load."""

    def __init__(self, session: Session) -> None:
        self.steady = SteadyWindow(session.rule)
        self._session = session
        self.states: list[GpuState] = []
        self._uuids: tuple[str, ...] = ()

    def on(self, machines: Machines) -> _Watch:
        self._uuids = machines.own_gpu_uuids
        return self

    def log(self, record: Mapping[str, Any]) -> None:
        self.steady.log(record)
        if self.done and self._uuids and not self.states:
            self.states = self._read_states()

    def _read_states(self) -> list[GpuState]:
        try:
            with open_nvml() as nvml:
                return read_states(nvml, self._uuids)
        except InputError as error:  # an AMD GPU, or a machine without pynvml: the joules are good without
            self._session.note_once(f"settings of the GPUs are not read: {error}")
            return []

    @property
    def done(self) -> bool:
        return self.steady.done


def _window_values(window: Window) -> dict[str, Any]:
    return {
        "first_step": window.first_step,
        "last_step": window.last_step,
        "tokens": window.tokens,
        "seconds": window.seconds,
        "settled": window.settled,
        "settle_s": window.settle_s,
        "loss_start": window.loss_start,
        "loss_end": window.loss_end,
    }


def _efficiency(config: RunConfig, window: Window, trained: Trained) -> dict[str, Any]:
    assert window.energy_j is not None
    tokens_per_j = window.tokens / window.energy_j
    flop_per_j = tokens_per_j * trained.flops_per_token
    precisions = precisions_in_use(config.train.precision, config.model.expert_precision)
    return {
        "tokens_per_s": window.tokens / window.seconds,
        "tokens_per_j": tokens_per_j,
        "active_param_tokens_per_j": tokens_per_j * trained.params_active,
        "model_flop_per_j": flop_per_j,
        "of_peak": [share.model_dump() for share in of_peak(trained.device, flop_per_j, precisions)],
    }


def energy_figure(trained: Trained, joules: float) -> dict[str, Any]:
    """Joules of a window, with the labels of the meter that counted them and what it saw of the whole leg."""
    energy = trained.energy
    return {
        "joules": joules,
        "source": energy.source,
        "boundary": energy.boundary,
        "validity": energy.validity,
        "validity_detail": energy.validity_detail,
        "description": energy.description,
        "idle_w": energy.idle_w,
        "cross_check": energy.cross_check,
        "spread": energy.spread,
        "levels": energy.levels,
    }


def _work(case: Case, trained: Trained) -> Work:
    config = case.config
    start = config.train.init_from
    return Work(
        config=case.path,
        overrides=list(case.overrides),
        config_sha256=hashlib.sha256(dump_config(config).encode()).hexdigest(),
        params_total=trained.params_total,
        params_active=trained.params_active,
        flops_per_token=trained.flops_per_token,
        flops_convention=FLOPS_CONVENTION,
        precision=config.train.precision,
        expert_precision=config.model.expert_precision,
        seq_length=config.data.seq_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        recompute=config.train.recompute,
        layout=trained.layout,
        engine=config.engine.name,
        weights="random initialisation" if start is None else str(start),
    )


def _machine(trained: Trained, states: list[GpuState]) -> Machine:
    def each(name: str) -> list[Any] | None:
        values = [getattr(state, name) for state in states]
        return None if not values or None in values else values

    reasons = {reason for state in states for reason in state.throttle_reasons or ()}
    return Machine(
        device=trained.device,
        ranks=trained.ranks,
        logical_cpus=os.cpu_count(),
        gpu_uuids=list(trained.machines.gpu_uuids),
        driver=states[0].driver if states else None,
        power_limit_w=each("power_limit_w"),
        default_power_limit_w=each("default_power_limit_w"),
        sm_clock_mhz=each("sm_clock_mhz"),
        temperature_c=each("temperature_c"),
        throttle_reasons=sorted(reasons) if states else None,
    )
