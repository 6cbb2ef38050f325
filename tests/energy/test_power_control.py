"""Settings of GPUs change only on request, and go back on every way out."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from simulated_gpus import DEFAULT_LIMIT_W, SimulatedGpu, simulated_nvml

from moe.energy.power_control import PowerControl, RestoreError, power_capped, read_states
from moe.errors import InputError

UUIDS = ["GPU-a", "GPU-b"]


@pytest.fixture
def gpus() -> list[SimulatedGpu]:
    found = [SimulatedGpu(uuid) for uuid in UUIDS]
    found[1].limit_w = 650.0  # as its operator had set it
    return found


def settings(gpus: list[SimulatedGpu]) -> list[tuple[float, int | None]]:
    return [(gpu.limit_w, gpu.lock_mhz) for gpu in gpus]


def test_states_are_read_and_nothing_is_changed(gpus):
    before = settings(gpus)
    first, second = read_states(simulated_nvml(gpus), UUIDS)
    assert (first.power_limit_w, first.default_power_limit_w, first.power_limits_w) == (700, 700, (200, 700))
    assert (second.power_limit_w, second.throttle_reasons, first.throttle_reasons) == (
        650,
        ("power cap",),
        (),
    )
    assert settings(gpus) == before


def test_without_the_flag_nothing_is_changed(gpus):
    with pytest.raises(InputError, match="--allow-power-changes"):
        PowerControl(simulated_nvml(gpus), UUIDS, allowed=False)


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def end_by(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


WAYS_OUT = {
    "end": (lambda: None, None),
    "error": (lambda: 1 / 0, ZeroDivisionError),
    "ctrl-c": (press_ctrl_c, KeyboardInterrupt),
    "SIGTERM": (lambda: end_by(signal.SIGTERM), SystemExit),
    "SIGHUP": (lambda: end_by(signal.SIGHUP), SystemExit),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_settings_go_back_on_every_way_out(gpus, way):
    leave, expected = WAYS_OUT[way]
    before, handlers = settings(gpus), [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)]

    def change_and_leave() -> None:
        with PowerControl(simulated_nvml(gpus), UUIDS, allowed=True) as control:
            control.set_power_limit(400)
            control.lock_clock(1200)
            assert settings(gpus) == [(400, 1200)] * 2
            leave()

    if expected is None:
        change_and_leave()
    else:
        with pytest.raises(expected):
            change_and_leave()
    assert settings(gpus) == before
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)] == handlers


def test_a_ctrl_c_while_settings_go_back_does_not_stop_it(gpus):
    before, nvml = settings(gpus), simulated_nvml(gpus)
    set_limit, pressed = nvml.nvmlDeviceSetPowerManagementLimit, []

    def interrupted(gpu, milliwatts):
        if milliwatts == 700_000 and not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        set_limit(gpu, milliwatts)

    nvml.nvmlDeviceSetPowerManagementLimit = interrupted
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), PowerControl(nvml, UUIDS, allowed=True) as control:
            control.set_power_limit(400)
    finally:
        signal.signal(signal.SIGINT, old)
    assert pressed
    assert settings(gpus) == before


def test_a_ctrl_c_taken_by_another_thread_does_not_stop_it_either(gpus):
    before, nvml = settings(gpus), simulated_nvml(gpus)
    set_limit, done = nvml.nvmlDeviceSetPowerManagementLimit, threading.Event()
    pressed, restored = [], []
    other = threading.Thread(target=done.wait)  # as torch has many: it takes what the main thread blocks
    other.start()

    def interrupted(gpu, milliwatts):
        if milliwatts == 700_000 and not pressed:
            pressed.append(True)
            signal.pthread_kill(other.ident, signal.SIGINT)
            time.sleep(0.1)  # until it has come, and Python would raise
        set_limit(gpu, milliwatts)
        restored.append(gpu.uuid)

    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with PowerControl(nvml, UUIDS, allowed=True) as control:
            control.set_power_limit(400)
            restored.clear()
            nvml.nvmlDeviceSetPowerManagementLimit = interrupted
            with pytest.raises(KeyboardInterrupt):
                control.restore()
            assert restored == UUIDS  # it is delivered, but after both are back
            assert settings(gpus) == before
    finally:
        signal.signal(signal.SIGINT, old)
        done.set()
        other.join()


def test_without_rights_the_error_is_theirs_and_nothing_is_put_back(gpus):
    nvml = simulated_nvml(gpus, may_set=False)
    with PowerControl(nvml, UUIDS, allowed=True) as control:
        for change in (lambda: control.set_power_limit(400), lambda: control.lock_clock(1200)):
            with pytest.raises(InputError, match="rights of an administrator"):
                change()
        assert control.undo_commands == []


def test_only_what_was_changed_is_to_be_undone(gpus):
    with PowerControl(simulated_nvml(gpus), UUIDS, allowed=True) as control:
        control.set_power_limit(400)
        limits = ["nvidia-smi -i GPU-a -pl 700", "nvidia-smi -i GPU-b -pl 650"]
        assert control.undo_commands == limits
        control.lock_clock(1200)
        assert len(control.undo_commands) == 4
        control.restore()
        assert control.undo_commands == []


def test_missing_rights_are_said_and_what_was_changed_goes_back(gpus):
    nvml = simulated_nvml(gpus)
    allowed, before = nvml.nvmlDeviceSetPowerManagementLimit, settings(gpus)

    def only_the_first(gpu, milliwatts):
        if gpu.uuid == "GPU-b" and milliwatts == 400_000:
            raise nvml.NVMLError("Insufficient Permissions")
        allowed(gpu, milliwatts)

    nvml.nvmlDeviceSetPowerManagementLimit = only_the_first
    with (
        pytest.raises(InputError, match=r"GPU-b: the power limit cannot be set .*rights of an administrator"),
        PowerControl(nvml, UUIDS, allowed=True) as control,
    ):
        control.set_power_limit(400)
    assert settings(gpus) == before


def test_a_gpu_that_refuses_its_old_settings_is_named_with_the_command(gpus):
    nvml = simulated_nvml(gpus)
    set_limit = nvml.nvmlDeviceSetPowerManagementLimit

    def refuses(gpu, milliwatts):
        if gpu.uuid == "GPU-a" and milliwatts == round(DEFAULT_LIMIT_W * 1e3):
            raise nvml.NVMLError("GPU is lost")
        set_limit(gpu, milliwatts)

    nvml.nvmlDeviceSetPowerManagementLimit = refuses
    with (
        pytest.raises(RestoreError, match="nvidia-smi -i GPU-a -pl 700"),
        PowerControl(nvml, UUIDS, allowed=True) as control,
    ):
        control.set_power_limit(400)
    assert gpus[1].limit_w == 650  # the other one is back all the same


def test_a_limit_out_of_range_is_refused(gpus):
    with (
        pytest.raises(InputError, match="100 W is not within 200 and 700 W"),
        PowerControl(simulated_nvml(gpus), UUIDS, allowed=True) as control,
    ):
        control.set_power_limit(100)


def test_a_cap_says_how_to_undo_it_and_goes_back(gpus):
    before, notes = settings(gpus), []

    def fail_under_cap() -> None:
        with power_capped(simulated_nvml(gpus), UUIDS, 400, allowed=True, note=notes.append):
            assert settings(gpus) == [(400, None)] * 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_under_cap()
    assert settings(gpus) == before
    assert notes == [
        "if this process is killed (SIGKILL), run: nvidia-smi -i GPU-a -pl 700; nvidia-smi -i GPU-b -pl 650"
    ]
