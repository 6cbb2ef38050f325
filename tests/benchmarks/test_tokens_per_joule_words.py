"""What the tokens-per-joule benchmark says of its legs, and what it does around them; nothing trains here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from train_runs import REPOSITORY

from benchmarks import bench_tokens_per_joule, joules_to_loss, tokens_per_joule_legs
from benchmarks.bench_tokens_per_joule import parse
from benchmarks.measure_stage_times import PassTimer
from benchmarks.tokens_per_joule_legs import Case, Session, _Watch, energy_figure, run_leg
from benchmarks.tokens_per_joule_page import draw, page
from benchmarks.tokens_per_joule_record import FLOPS_CONVENTION, Leg, TargetLoss, check
from benchmarks.tokens_per_joule_summary import judge, summarize
from benchmarks.tokens_per_joule_text import as_text
from moe.config import load_config
from moe.energy.steady_state import SHORT
from moe.energy.watch import Machines
from moe.errors import InputError
from moe.metering.report import Energy

ENERGY: dict[str, Any] = {
    "joules": 100.0,
    "source": "nvml_counter",
    "boundary": "gpu",
    "validity": "checked",
    "validity_detail": "counter 100 J, trace 101 J",
    "description": "one GPU",
    "idle_w": 91.5,
    "cross_check": {"counter_j": 100.0, "trace_j": 101.0, "window_s": 70.0},
    "spread": None,
    "levels": [{"boundary": "gpu", "basis": "measured", "source": "NVML", "energy_j": 130.0}],
}
WORK: dict[str, Any] = {
    "config": "a.yaml",
    "overrides": [],
    "config_sha256": "00",
    "params_total": 10,
    "params_active": 5,
    "flops_per_token": 30,
    "flops_convention": FLOPS_CONVENTION,
    "precision": "bf16",
    "expert_precision": "bf16",
    "seq_length": 64,
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "recompute": "none",
    "layout": {"tp": 1},
    "engine": "megatron",
    "weights": "random initialisation",
}
MACHINE: dict[str, Any] = {
    "device": "NVIDIA H100 80GB HBM3",
    "ranks": 1,
    "logical_cpus": 2,
    "gpu_uuids": ["GPU-a"],
    "driver": "1",
    "power_limit_w": [500.0],
    "default_power_limit_w": [700.0],
    "sm_clock_mhz": [1500],
    "temperature_c": [60],
    "throttle_reasons": ["power cap"],
}


def leg(role: str, repeat: int, *, cap_w: float | None = None, minute: int = 0, forced: bool = False) -> Leg:
    """A leg as the benchmark writes it."""
    tokens_per_j = (2.0 if role == "a" else 1.0) * (1 + 0.001 * repeat)
    record = check(
        {
            "kind": "leg",
            "schema_version": 1,
            "run_id": "r",
            "time": f"2026-01-01T00:{minute:02d}:00+00:00",
            "mode": "short",
            "role": role,
            "repeat": repeat,
            "routing": "forced_balance" if forced else "natural",
            "is_upper_bound": forced,
            "power_cap_w": cap_w,
            "work": WORK,
            "machine": MACHINE,
            "software": {"commit": None, "python": "3", "torch": "2", "triton": None},
            "first_step": 1,
            "last_step": 2,
            "tokens": 100,
            "seconds": 300.0,
            "settled": True,
            "settle_s": 1.0,
            "loss_start": 9.0,
            "loss_end": 8.0,
            "energy": ENERGY,
            "tokens_per_s": 1.0,
            "tokens_per_j": tokens_per_j,
            "active_param_tokens_per_j": 5 * tokens_per_j,
            "model_flop_per_j": 30 * tokens_per_j,
            "of_peak": [],
        }
    )
    assert isinstance(record, Leg)
    return record


def target_loss(role: str, seed: int, joules: float, **energy: Any) -> TargetLoss:
    """One seed's way to the loss."""
    record = check(
        {
            "kind": "target_loss",
            "schema_version": 1,
            "run_id": "r",
            "role": role,
            "name": f"{role}.yaml",
            "seed": seed,
            "target_loss": 3.0,
            "reached": True,
            "steps": 10,
            "tokens": 1000,
            "heldout_loss": 2.9,
            "energy": ENERGY | {"joules": joules} | energy,
        }
    )
    assert isinstance(record, TargetLoss)
    return record


def under_caps() -> list[Leg]:
    """Two caps, three natural pairs and one forced pair under each, in the records' order."""
    legs, minute = [], 0
    for cap_w in (500.0, 600.0):
        for forced, repeats in ((False, 3), (True, 1)):
            for repeat in range(repeats):
                for role in ("a", "b"):
                    legs.append(leg(role, repeat, cap_w=cap_w, minute=minute, forced=forced))
                    minute += 1
    return sorted(legs, key=lambda each: (each.power_cap_w, each.is_upper_bound, each.role))


def losses() -> list[Any]:
    """Joules to a loss of both sides, with their verdict."""
    a = [target_loss("a", seed, 100.0 + seed) for seed in range(3)]
    b = [target_loss("b", seed, 200.0 + seed) for seed in range(3)]
    return [*a, *b, joules_to_loss.judge(a, b)]


def natural(legs: Sequence[Leg], role: str) -> list[Leg]:
    return [
        each for each in legs if each.role == role and each.power_cap_w == 500 and not each.is_upper_bound
    ]


def test_verdicts_say_under_which_cap_and_what_the_joules_are():
    legs = under_caps()
    verdict = judge(natural(legs, "a"), natural(legs, "b"), ("a.yaml", "b.yaml"))
    records = [*legs, summarize(natural(legs, "a"), "a.yaml"), verdict, *losses()]
    what = "measured (nvml_counter), checked, boundary gpu"
    text = as_text(records)
    assert f"a is BETTER against b ({what}, power cap 500 W)" in text
    assert f"a is BETTER against b ({what}, no power cap set)" in text
    assert "power limit in force: 500 W" in text
    assert "idle power, included: 91.5 W" in text
    whole = page(records, b"")
    head = whole[: whole.index("<h2>All results")]
    assert f"times its tokens/J ({what}, power cap 500 W)</p>" in head
    assert f"times its joules ({what}, no power cap set)</p>" in head
    assert "idle power (91.5 W) included" in whole


def test_each_leg_has_its_own_place_in_the_picture_and_the_axis_says_what_joules_are():
    axes, _ = draw(under_caps()).axes
    natural_a, forced_a, natural_b, forced_b = (list(line.get_xdata()) for line in axes.get_lines())
    assert (natural_a, natural_b) == ([1, 3, 5, 9, 11, 13], [2, 4, 6, 10, 12, 14])
    assert (forced_a, forced_b) == ([7, 15], [8, 16])
    assert "measured (nvml_counter), checked, boundary gpu" in axes.get_ylabel()


def test_joules_of_different_kinds_are_not_compared_to_a_loss():
    a = [target_loss("a", seed, 100.0) for seed in range(2)]
    for other in ({"source": "estimated"}, {"boundary": "node"}):
        b = [target_loss("b", seed, 200.0 + seed, **other) for seed in range(2)]
        with pytest.raises(ValueError, match="cannot be compared"):
            joules_to_loss.judge(a, b)
        with pytest.raises(ValueError, match="cannot be compared"):
            joules_to_loss.summarize([a[0], b[1]])


def test_a_figure_keeps_all_that_the_meter_says():
    levels = [
        {"boundary": boundary, "basis": basis, "source": "x", "energy_j": joules}
        for boundary, basis, joules in (
            ("gpu", "measured", 130.0),
            ("node", "estimated", 200.0),
            ("fabric", "estimated", 210.0),
            ("facility", "unknown", None),
        )
    ]
    energy = Energy.model_validate(
        {key: value for key, value in ENERGY.items() if key != "joules"}
        | {"total_j": 130.0, "levels": levels}
    )
    figure = leg("a", 0).energy
    made = type(figure).model_validate(energy_figure(SimpleNamespace(energy=energy), 100.0))
    assert made == figure.model_copy(update={"levels": energy.levels})


def case(role: str = "a", *overrides: str) -> Case:
    path = REPOSITORY / "configs" / "quickstart.yaml"
    return Case(role, role, str(path), overrides, load_config(path, list(overrides), world_size=1))


def session(notes: list[str]) -> Session:
    return Session("r", SHORT, notes.append, SimpleNamespace(renew=lambda: None))


def test_no_evaluation_falls_into_a_window(monkeypatch):
    trained_with = []

    def train_watched(config, *_, **__):
        trained_with.append(config.train.eval_interval)

    monkeypatch.setattr(tokens_per_joule_legs, "train_watched", train_watched)
    run_leg(case("a", "train.eval_interval=7"), session([]), repeat=0)
    assert trained_with == [0]


def test_gpus_whose_settings_cannot_be_read_are_noted_once_and_measured(monkeypatch):
    def open_nvml():
        raise InputError("power limits need pynvml")

    monkeypatch.setattr(tokens_per_joule_legs, "open_nvml", open_nvml)
    notes: list[str] = []
    shared = session(notes)
    for _ in range(2):
        watch = _Watch(shared).on(Machines(("host",), ("GPU-a",), ("GPU-a",)))
        for step in range(1, 30):
            watch.log({"step": step, "wall_s": step, "energy_j": 9.0 * step, "tokens": step, "loss": 9.0})
        assert watch.done and watch.states == []
    assert notes == ["settings of the GPUs are not read: power limits need pynvml"]


def test_without_natural_windows_there_is_no_verdict(monkeypatch):
    monkeypatch.setattr(
        bench_tokens_per_joule,
        "run_leg",
        lambda case, _, **options: leg(case.role, 0, forced=options["forced"]),
    )
    args = parse(["x.yaml", "--repeats", "0", "--target-loss", "3"])
    sides = [case("a"), replace(case("b"))]
    kinds = [each.kind for each in bench_tokens_per_joule._windows(sides, session([]), args, None)]
    assert kinds == ["leg", "leg", "summary", "summary"]


def test_time_of_a_step_is_the_sum_of_its_uneven_chunks():
    timer = PassTimer()
    # Two micro-batches through chunks of 1, 1 and 4 s, in seven steps, the first two of them slow.
    timer.seconds = [9.0] * 12 + [1.0, 1.0, 4.0] * 2 * 5
    assert timer.median_step_s(6) / 2 == 6  # the median pass times the chunks would be 3
