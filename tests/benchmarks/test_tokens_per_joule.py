"""Tokens per joule: windows, statistics, the published schema, and the benchmark itself on a CPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from train_runs import REPOSITORY, TINY, environment

from benchmarks import bench_tokens_per_joule
from benchmarks.ab_statistics import compare, mean_interval, student_t
from benchmarks.bench_tokens_per_joule import measure, parse
from benchmarks.forced_balance import forced_balance
from benchmarks.joules_to_loss import TargetWatch
from benchmarks.peak_flop_per_joule import gpu_of, of_peak, precisions_in_use
from benchmarks.rendezvous import Rendezvous
from benchmarks.tokens_per_joule_legs import Case, Session, run_leg
from benchmarks.tokens_per_joule_page import write_page
from benchmarks.tokens_per_joule_record import (
    SCHEMA_FILE,
    AgainstRecord,
    Leg,
    Summary,
    check,
    read_lines,
    schema_text,
)
from benchmarks.tokens_per_joule_summary import judge
from moe.config import load_config
from moe.energy.steady_state import FULL, SHORT, SteadyWindow, resolution
from moe.errors import InputError
from moe.layer import MoEConfig
from moe.layer.router import Router

# ---- statistics -------------------------------------------------------------------------------------------


def simulated_legs(random: np.random.Generator, pairs: int, effect: float = 0.0) -> tuple[list, list]:
    """Tokens per joule of legs A, B, A, B, ... on a machine that warms up, drifts and remembers.

    Noise of one leg: 0.5 % that decays by half from leg to leg (AR(1)) and 0.3 % of its own. The machine
    begins 2 % below what it reaches after the first legs, and gains 0.3 % a leg.
    """
    remembered, values = random.normal(0, 0.005 / math.sqrt(0.75)), []
    for leg in range(2 * pairs):
        remembered = 0.5 * remembered + random.normal(0, 0.005)
        trend = 0.003 * leg - 0.02 * math.exp(-leg / 2)
        side = effect / 2 if leg % 2 == 0 else -effect / 2
        values.append(20 * math.exp(trend + remembered + random.normal(0, 0.003) + side))
    return values[::2], values[1::2]


@pytest.mark.parametrize("seed", range(3))
def test_null_comparison_is_inconclusive_in_95_of_100_repeats(seed):
    random = np.random.default_rng(seed)
    verdicts = [compare(*simulated_legs(random, pairs=5)).verdict for _ in range(100)]
    assert verdicts.count("inconclusive") >= 95


def test_interval_covers_what_it_promises():
    random = np.random.default_rng(7)
    found = [compare(*simulated_legs(random, pairs=5, effect=0.01)).ratio for _ in range(500)]
    covered = sum(ratio.low <= math.exp(0.01) <= ratio.high for ratio in found)
    assert covered >= 0.95 * len(found)


def test_a_difference_of_three_percent_is_found_and_named():
    random = np.random.default_rng(8)
    for effect, verdict in ((0.03, "better"), (-0.03, "worse")):
        found = [compare(*simulated_legs(random, pairs=5, effect=effect)).verdict for _ in range(100)]
        assert found.count(verdict) >= 95


def test_steady_drift_is_no_difference():
    legs = [100 * 1.02**leg * (1 + 1e-6 * (-1) ** (leg // 2)) for leg in range(10)]
    found = compare(legs[::2], legs[1::2])
    assert found.ratio.mean == pytest.approx(1, abs=1e-5)
    assert found.drift_per_leg == pytest.approx(0.02, rel=1e-3)
    assert mean_interval(found.pair_ratios).high < 0.99  # the plain mean of pairs would have called A worse


def test_what_the_meter_cannot_resolve_is_no_difference():
    a, b = [1.003, 1.0031, 1.0029, 1.003, 1.0031], [1.0, 1.0001, 0.9999, 1.0, 1.0001]
    assert compare(a, b).verdict == "better"
    assert compare(a, b, resolution=resolution("nvml_counter", 40.0)).verdict == "inconclusive"
    assert (resolution("nvml_counter", 300), resolution("rapl", 300)) == (0.2 / 300, 0.0)


@pytest.mark.parametrize(("a", "b"), [([1, 2], [1, 2]), ([1, 2, 3], [1, 2]), ([1, 2, 0], [1, 2, 3])])
def test_too_few_or_impossible_legs_are_refused(a, b):
    with pytest.raises(ValueError, match=r"legs|positive"):
        compare(a, b)


def test_quantiles_of_student_t():
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 7: 2.3646, 17: 2.1098, 30: 2.0423}
    for degrees, quantile in table.items():
        assert student_t(degrees) == pytest.approx(quantile, abs=5e-5)


# ---- windows ----------------------------------------------------------------------------------------------


def steps(step_s: float, watts: Any, *, until_s: float) -> list[dict[str, Any]]:
    """Records of a training; `watts` by time."""
    records, time_s, energy_j = [], 0.0, 0.0
    while time_s < until_s:
        energy_j += watts(time_s) * step_s
        time_s += step_s
        step = len(records) + 1
        records.append(
            {
                "step": step,
                "wall_s": time_s,
                "energy_j": energy_j,
                "tokens": 100 * step,
                "loss": 9 - 0.001 * step,
            }
        )
    return records


def find_window(rule, records) -> SteadyWindow:
    watch = SteadyWindow(rule)
    for record in records:
        watch.log(record)
        if watch.done:
            break
    return watch


@pytest.mark.parametrize(("step_s", "seconds"), [(10.0, 300), (2.0, 100), (0.5, 60)])
def test_full_window_is_300_s_or_50_steps_of_a_minute(step_s, seconds):
    window = find_window(FULL, steps(step_s, lambda _: 700.0, until_s=900)).window
    assert window.settled
    assert seconds <= window.seconds < seconds + 2 * step_s
    assert window.tokens == 100 * (window.last_step - window.first_step + 1)
    assert window.energy_j == pytest.approx(700 * window.seconds)
    assert 60 <= window.settle_s < 60 + 4 * step_s + 20


def test_window_waits_until_the_machine_has_settled():
    def warming(time_s: float) -> float:
        return 700 * (1 - 0.3 * math.exp(-time_s / 60))

    window = find_window(FULL, steps(2.0, warming, until_s=2000)).window
    assert window.settled
    assert 100 < window.settle_s < 300
    assert window.energy_j / window.seconds == pytest.approx(700, rel=0.03)


def test_machine_that_never_settles_is_measured_and_said_to_be_unsettled():
    window = find_window(FULL, steps(2.0, lambda t: 500 + 0.5 * t, until_s=2000)).window
    assert not window.settled
    assert window.settle_s >= FULL.settle_limit_s


def test_short_window_and_a_meter_that_failed():
    records = steps(0.2, lambda _: 10.0, until_s=10)
    window = find_window(SHORT, records).window
    assert (window.first_step, window.last_step) == (4, 11)
    for record in records[6:]:
        record["energy_j"] = None
    assert find_window(SHORT, records).window.energy_j is None


def test_joules_at_the_target_loss_are_interpolated():
    watch = TargetWatch(7.0)
    for step, loss in ((10, 8.0), (20, 7.5), (30, 6.5)):
        watch.log({"step": step, "heldout_loss": loss, "energy_j": 10.0 * step, "tokens": 5 * step})
        watch.log({"step": step + 1, "heldout_loss": None, "energy_j": 10.0 * step + 1, "tokens": 0})
    assert watch.done
    assert (watch.at_target("energy_j"), watch.at_target("tokens")) == (250, 125)


# ---- routing and peaks ------------------------------------------------------------------------------------


def test_forced_balance_gives_every_expert_the_same_and_keeps_the_gradient():
    config = MoEConfig(hidden_size=16, num_experts=8, top_k=2, expert_hidden_size=8)
    router = Router(config)
    router.reset_parameters()
    x_TD = torch.randn(32, 16)
    natural = router(x_TD)
    with forced_balance():
        forced = router(x_TD)
    assert forced.counts_E.tolist() == [8] * 8
    assert natural.counts_E.tolist() != [8] * 8
    assert all(len(set(row)) == 2 for row in forced.ids_TK.tolist())
    assert torch.equal(forced.weights_TK, natural.weights_TK)
    forced.weights_TK.square().sum().backward()
    assert router.weight_ED.grad.abs().sum() > 0
    assert torch.equal(router(x_TD).ids_TK, natural.ids_TK)  # the switch is off again


def test_share_of_peak_states_its_basis():
    assert gpu_of("NVIDIA GB200").name == "gb200"
    assert gpu_of("NVIDIA H100 80GB HBM3").name == "h100"
    for other in (
        "NVIDIA GH200 480GB",
        "NVIDIA H100 PCIe",
        "NVIDIA H200 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ):
        assert gpu_of(other) is None
    (tf32,) = of_peak("NVIDIA B200", 1e12, ("fp32",))
    assert "dense TF32 peak" in tf32.basis
    assert of_peak("cpu", 1e9, ("bf16",)) == []
    wide, narrow = of_peak("NVIDIA H100 80GB HBM3", 0.5e12, precisions_in_use("bf16", "fp8"))
    assert wide.percent == pytest.approx(100 * 0.5e12 / (989e12 / 700))
    assert narrow.percent == pytest.approx(wide.percent * 989 / 1979)
    assert "bf16 peak of 989 TFLOP/s over the board's 700 W" in wide.basis


# ---- the benchmark ----------------------------------------------------------------------------------------


def bench(tmp_path: Path, *arguments: str) -> tuple[str, Path]:
    path = tmp_path / "out.jsonl"
    recipe = str(REPOSITORY / "configs" / "quickstart.yaml")
    module = [sys.executable, "-m", "benchmarks.bench_tokens_per_joule"]
    done = subprocess.run(
        [*module, recipe, *TINY, *arguments, "--json", str(path)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, path


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> tuple[str, Path]:
    return bench(
        tmp_path_factory.mktemp("bench"),
        *("model.top_k=2", "--against-override", "model.top_k=8", "--repeats", "3"),
    )


def test_top_2_against_top_8_prints_intervals_and_writes_checked_lines(result):
    text, path = result
    records = read_lines(path)
    legs = [record for record in records if isinstance(record, Leg)]
    natural = [leg for leg in legs if leg.routing == "natural"]
    assert [(leg.role, leg.repeat) for leg in natural] == [
        ("a", 0),
        ("a", 1),
        ("a", 2),
        ("b", 0),
        ("b", 1),
        ("b", 2),
    ]
    assert [leg.is_upper_bound for leg in legs if leg.routing == "forced_balance"] == [True, True]
    (verdict,) = [record for record in records if isinstance(record, AgainstRecord)]
    assert verdict.ratio.ci95_low < verdict.ratio.mean < verdict.ratio.ci95_high
    assert f"[{verdict.ratio.ci95_low:.4g}, {verdict.ratio.ci95_high:.4g}]" in text
    assert f"a is {verdict.verdict.upper()} against b" in text
    assert "forced balance, an UPPER BOUND" in text
    assert "idle power, included: " in text and "power limit in force: " in text
    if natural[0].energy.source == "estimated":
        assert "ESTIMATED, not measured" in text
    for leg in legs:
        assert leg.tokens_per_j == pytest.approx(leg.tokens / leg.energy.joules)
        assert leg.model_flop_per_j == pytest.approx(leg.tokens_per_j * leg.work.flops_per_token)
        assert leg.mode == "short"
    assert legs[0].work.flops_per_token < natural[-1].work.flops_per_token  # top-2 and top-8


def test_page_is_whole_in_itself(result, tmp_path):
    page, picture = write_page(read_lines(result[1]), tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "data:image/png;base64," in text and "http" not in text and "<script" not in text
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("missing", ["source", "boundary", "validity", "description", "levels"])
def test_a_figure_of_energy_without_its_labels_is_refused(result, missing):
    for line in result[1].read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        check(values)
        if missing in ("description", "levels") and values["kind"] != "leg":
            continue
        del values["energy"][missing]
        with pytest.raises(InputError, match=rf"energy\.{missing}: Field required"):
            check(values)


def test_published_schema_is_that_of_the_code_and_demands_the_labels():
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), (
        "run `python -m benchmarks.tokens_per_joule_record`"
    )
    parts = json.loads(schema_text())["$defs"]
    assert {"source", "boundary"} <= set(parts["EnergyFigure"]["required"])
    assert {"source", "boundary"} <= set(parts["EnergyLabel"]["required"])
    for kind in ("Leg", "Summary", "AgainstRecord", "TargetLoss", "TargetLossSummary"):
        assert "energy" in parts[kind]["required"]
        assert parts[kind]["additionalProperties"] is False


def test_invalid_energy_has_no_verdict(result):
    legs = [
        record for record in read_lines(result[1]) if isinstance(record, Leg) and not record.is_upper_bound
    ]
    a = [leg.model_copy(update={"tokens_per_j": 2.0 + 0.001 * leg.repeat}) for leg in legs if leg.role == "a"]
    b = [leg.model_copy(update={"tokens_per_j": 1.0 + 0.001 * leg.repeat}) for leg in legs if leg.role == "b"]
    assert judge(a, b, ("a", "b")).verdict == "better"
    a[0] = a[0].model_copy(update={"energy": a[0].energy.model_copy(update={"validity": "invalid"})})
    assert judge(a, b, ("a", "b")).verdict == "inconclusive"
    a[0] = a[0].model_copy(update={"energy": a[0].energy.model_copy(update={"boundary": "gpu"})})
    with pytest.raises(ValueError, match="cannot be compared"):
        judge(a, b, ("a", "b"))


def test_power_caps_need_the_flag(capsys):
    with pytest.raises(SystemExit):
        parse(["x.yaml", "--power-caps", "500,600"])
    assert "--allow-power-changes" in capsys.readouterr().err
    assert parse(["x.yaml", "--power-caps", "500,600", "--allow-power-changes"]).power_caps == (500, 600)
    with pytest.raises(SystemExit):
        parse(["x", "--power-caps", "500", "--allow-power-changes", "--repeats", "0", "--target-loss", "3"])
    assert "--repeats 0 leaves none" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_caps_that_are_not_allowed_are_refused_on_every_rank_before_training(monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    args = parse(
        [str(REPOSITORY / "configs" / "quickstart.yaml"), "--power-caps", "5", "--allow-power-changes"]
    )
    args.allow_power_changes = False
    with pytest.raises(InputError, match="ask for it with --allow-power-changes"):
        measure(args)


def test_what_to_run_after_a_kill_is_said_once(monkeypatch):
    @contextmanager
    def capped(_nvml, _uuids, _watts, *, allowed, note):
        assert allowed
        note("if this process is killed, run: ...")
        yield

    said = []
    monkeypatch.setattr(bench_tokens_per_joule, "_note", said.append)
    monkeypatch.setattr(bench_tokens_per_joule, "power_capped", capped)
    monkeypatch.setattr(bench_tokens_per_joule, "open_nvml", nullcontext)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(uuid="a"))
    cap = bench_tokens_per_joule._capping(allowed=True)
    for watts in (500, 500, 600):
        with cap(watts):
            pass
    assert said == ["if this process is killed, run: ..."]


def test_a_cap_goes_back_before_the_engine_closes(monkeypatch):
    """Closing waits for the other ranks, of which one may be gone for good."""
    events = []

    @contextmanager
    def capped(watts):
        events.append(f"capped at {watts:g} W")
        yield
        events.append("put back")

    class FailingEngine:
        def close(self):
            events.append("engine closed")

    monkeypatch.setattr("moe.energy.training_leg.make_engine", lambda _: FailingEngine())
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml")
    session = Session("0", SHORT, events.append, Rendezvous(), capped)
    with pytest.raises(AttributeError, match="FailingEngine"):
        run_leg(Case("a", "a", "a", (), config), session, repeat=0, power_cap_w=500)
    assert events == ["capped at 500 W", "put back", "engine closed"]


@pytest.mark.slow
def test_joules_to_a_target_loss(tmp_path):
    text, path = bench(tmp_path, "--repeats", "0", "--target-loss", "7.9", "--seeds", "2", "train.steps=40")
    kinds = [record.kind for record in read_lines(path)]
    assert kinds == ["target_loss", "target_loss", "target_loss_summary"]
    assert "held-out loss 7.9 after" in text
    assert not [record for record in read_lines(path) if isinstance(record, Summary)]
