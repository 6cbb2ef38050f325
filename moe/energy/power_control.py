"""Power limits and clocks of GPUs: read by anyone, changed only on request, and always put back.

NVML tells the power limit in force but not whether clocks are locked, so a power limit is put back to what it
was, and clocks are put back to unlocked: a lock that an operator had set before is lost.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from moe.errors import InputError, MoeError

# A job that is ended by these has to put the settings back as well; SIGINT already raises KeyboardInterrupt.
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_REASONS = {
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonHwThermalSlowdown": "hardware thermal slowdown",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
    "nvmlClocksEventReasonSwThermalSlowdown": "software thermal slowdown",
    "nvmlClocksEventReasonApplicationsClocksSetting": "application clocks",
}


class RestoreError(MoeError):
    """A GPU did not take its old settings back; the text has the command that sets them."""


@dataclass(frozen=True)
class GpuState:
    """Settings and readings of one GPU; None where NVML does not tell.

    Attributes:
        uuid: As NVML writes it.
        driver: Version.
        power_limit_w: In force.
        default_power_limit_w: After a reboot.
        power_limits_w: Least and most that can be set.
        sm_clock_mhz: Now.
        temperature_c: Of the die, now.
        throttle_reasons: Why clocks are below their most, now.
    """

    uuid: str
    driver: str | None
    power_limit_w: float | None
    default_power_limit_w: float | None
    power_limits_w: tuple[float, float] | None
    sm_clock_mhz: int | None
    temperature_c: int | None
    throttle_reasons: tuple[str, ...] | None


def read_states(nvml: Any, uuids: Sequence[str]) -> list[GpuState]:
    """State of each GPU; nothing is changed.

    Args:
        nvml: The `pynvml` module of nvidia-ml-py, initialised.
        uuids: GPU UUIDs.

    Raises:
        InputError: NVML does not know a UUID.
    """
    return [_state(nvml, uuid, _handle(nvml, uuid)) for uuid in uuids]


def _handle(nvml: Any, uuid: str) -> Any:
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError as error:
        raise InputError(f"NVML does not know GPU {uuid} ({error}); `nvidia-smi -L` lists them") from error


def _state(nvml: Any, uuid: str, handle: Any) -> GpuState:
    def ask(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except nvml.NVMLError:
            return None

    limits_mw = ask(nvml.nvmlDeviceGetPowerManagementLimitConstraints, handle)
    reasons = ask(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    return GpuState(
        uuid=uuid,
        driver=ask(nvml.nvmlSystemGetDriverVersion),
        power_limit_w=_watts(ask(nvml.nvmlDeviceGetPowerManagementLimit, handle)),
        default_power_limit_w=_watts(ask(nvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)),
        power_limits_w=None if limits_mw is None else (limits_mw[0] / 1e3, limits_mw[1] / 1e3),
        sm_clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        temperature_c=ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        throttle_reasons=None if reasons is None else _reasons(nvml, reasons),
    )


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1e3


def _reasons(nvml: Any, mask: int) -> tuple[str, ...]:
    return tuple(name for bit, name in _REASONS.items() if mask & getattr(nvml, bit, 0))


class PowerControl(AbstractContextManager["PowerControl"]):
    """Changes settings of GPUs inside a `with` block and puts them back however the block ends.

    That is at its end, at an exception, at Ctrl-C, SIGTERM and SIGHUP. Only SIGKILL and a power cut cannot be
    caught: `undo_commands` are what an operator runs after one. Clocks that were locked before come back
    unlocked, as NVML does not tell a lock.
    """

    def __init__(self, nvml: Any, uuids: Sequence[str], *, allowed: bool) -> None:
        """Look at the GPUs; nothing is changed yet.

        Args:
            nvml: The `pynvml` module of nvidia-ml-py, initialised.
            uuids: The GPUs to control.
            allowed: The user asked for changes.

        Raises:
            InputError: `allowed` is false, or a GPU is unknown or tells no power limit.
        """
        if not allowed:
            raise InputError(
                "this changes power limits or clocks of GPUs; ask for it with --allow-power-changes"
            )
        self._nvml = nvml
        self._handles = {uuid: _handle(nvml, uuid) for uuid in uuids}
        self.before = read_states(nvml, uuids)
        silent = [state.uuid for state in self.before if state.power_limit_w is None]
        if silent:
            raise InputError(f"GPU {silent[0]} does not tell its power limit, so it could not be put back")
        self._limited: set[str] = set()  # UUIDs that have another power limit than before
        self._locked: set[str] = set()  # and another clock

    @property
    def undo_commands(self) -> list[str]:
        """Commands that put back what this object changed and has not put back yet."""
        commands = []
        for state in self.before:
            if state.uuid in self._limited:
                commands.append(f"nvidia-smi -i {state.uuid} -pl {state.power_limit_w:g}")
            if state.uuid in self._locked:
                commands.append(f"nvidia-smi -i {state.uuid} -rgc")
        return commands

    def set_power_limit(self, watts: float) -> None:
        """Cap each GPU.

        Raises:
            InputError: A GPU cannot be set so low or high, or the rights are missing.
        """
        for state in self.before:
            low, high = state.power_limits_w or (0.0, float("inf"))
            if not low <= watts <= high:
                raise InputError(
                    f"GPU {state.uuid}: a limit of {watts:g} W is not within {low:g} and {high:g} W"
                )
        self._set("power limit", self._limited, lambda handle: self._limit(handle, watts))

    def lock_clock(self, mhz: int) -> None:
        """Lock the graphics clock of each GPU; `restore` unlocks it, whatever it was before.

        Raises:
            InputError: A GPU does not take the clock, or the rights are missing.
        """
        self._set(
            "clock", self._locked, lambda handle: self._nvml.nvmlDeviceSetGpuLockedClocks(handle, mhz, mhz)
        )

    def restore(self) -> None:
        """Put back what was changed, on every GPU, even if one of them refuses.

        Raises:
            RestoreError: A GPU refused; its text has the commands.
        """
        with _undisturbed():
            refused = [error for state in self.before for error in self._restore_one(state)]
        if refused:
            commands = "\n".join(self.undo_commands)
            raise RestoreError(f"GPU settings are not all put back: {'; '.join(refused)}. Run:\n{commands}")

    def __enter__(self) -> PowerControl:
        """Take over SIGTERM and SIGHUP, which would end the process before settings are put back."""
        self._old_handlers = {number: signal.signal(number, _exit) for number in _ENDING}
        return self

    def __exit__(self, *_: object) -> None:
        """Put the settings back, then the signals."""
        try:
            self.restore()
        except (KeyboardInterrupt, SystemExit):  # it may have come before the signals were held back
            self.restore()
            raise
        finally:
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)

    def _restore_one(self, state: GpuState) -> Iterator[str]:
        handle, nvml = self._handles[state.uuid], self._nvml
        undo: list[tuple[set[str], Callable[[], object]]] = []
        if state.uuid in self._limited:
            assert state.power_limit_w is not None
            limit_w = state.power_limit_w
            undo.append((self._limited, lambda: self._limit(handle, limit_w)))
        if state.uuid in self._locked:
            undo.append((self._locked, lambda: nvml.nvmlDeviceResetGpuLockedClocks(handle)))
        for changed, call in undo:
            try:
                call()
            except nvml.NVMLError as error:
                yield f"{state.uuid}: {error}"
            else:
                changed.discard(state.uuid)

    def _limit(self, handle: Any, watts: float) -> None:
        self._nvml.nvmlDeviceSetPowerManagementLimit(handle, round(watts * 1e3))

    def _set(self, what: str, changed: set[str], call: Callable[[Any], object]) -> None:
        for uuid, handle in self._handles.items():
            was_changed = uuid in changed
            changed.add(uuid)  # before the call, or a signal right after it would leave the GPU as it is
            try:
                call(handle)
            except self._nvml.NVMLError as error:
                if not was_changed:
                    changed.discard(uuid)
                raise InputError(
                    f"GPU {uuid}: the {what} cannot be set ({error}); it needs the rights of an administrator"
                ) from error


@contextlib.contextmanager
def power_capped(
    nvml: Any, uuids: Sequence[str], watts: float, *, allowed: bool, note: Callable[[str], None]
) -> Iterator[None]:
    """Cap GPUs inside a `with` block.

    Args:
        nvml: As of PowerControl.
        uuids: The GPUs.
        watts: Of each of them.
        allowed: The user asked for changes.
        note: Told what to run after a SIGKILL.

    Raises:
        InputError: `allowed` is false, or a GPU is unknown or cannot be capped so.
        RestoreError: at the end, a GPU refused.
    """
    with PowerControl(nvml, uuids, allowed=allowed) as control:
        control.set_power_limit(watts)
        note("if this process is killed (SIGKILL), run: " + "; ".join(control.undo_commands))
        yield


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the signals that end a job until the settings are put back; a second Ctrl-C must not stop that.

    They are taken by handlers, not blocked: a blocked thread leaves them to the other threads of the process,
    from where Python brings them back to the main thread.
    """
    caught: list[int] = []
    handlers = {}
    try:
        for number in (signal.SIGINT, *_ENDING):
            handlers[number] = signal.signal(number, lambda came, _frame: caught.append(came))
            signal.siginterrupt(number, False)  # the driver's calls go on
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for came in caught:
        signal.raise_signal(came)


@contextlib.contextmanager
def open_nvml() -> Iterator[Any]:
    """The `pynvml` module, initialised.

    Raises:
        InputError: It is not installed or cannot start.
    """
    try:
        import pynvml
    except ImportError as error:
        raise InputError("power limits need `pip install nvidia-ml-py`") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise InputError(f"NVML cannot start ({error}); check that nvidia-smi runs here") from error
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()
