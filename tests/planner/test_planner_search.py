"""Search, what-if, sites and the command: through the door that users take."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from train_runs import command, environment

from moe.config import load_config
from moe.errors import InputError
from moe.planner.command import Request, run_request
from moe.planner.hardware_file import find_gpu
from moe.planner.layout import Layout
from moe.planner.search import as_overrides, search
from moe.planner.settings import load_plan_config, make_job, searched_job
from moe.planner.site import Site, load_site
from moe.planner.step import step_time
from moe.planner.validate import published_config

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
KIMI = published_config("kimi_k2")
INTERFACE = {
    "params_total",
    "params_active",
    "params_active_no_embedding",
    "flops_per_token",
    "layout",
    "step_s",
    "tokens_per_s_per_gpu",
    "tflops_per_gpu",
    "memory_gib_worst_rank",
    "exposed_comm_s",
    "energy_j_per_step",
    "tokens_per_j",
    "evidence",
}


def planned(path: Path = QUICKSTART, *overrides: str, **more: Any) -> dict[str, Any]:
    request = Request(config=path, overrides=overrides, **{"gpus": 8, "gpu": "h100"} | more)
    values: dict[str, Any] = json.loads(run_request(request, as_object=True))
    return values


def moe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_command_prints_one_object_with_the_fixed_keys() -> None:
    done = moe("plan", str(QUICKSTART), "--gpus", "2", "--gpu", "b200", "--json", "parallel.ep=2")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values.keys() >= INTERFACE
    assert values["layout"]["ep"] == 2
    assert values["evidence"]["params_total"]["level"] == "exact"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan",), "needs a config"),
        (("plan", str(QUICKSTART), "--gpu", "v100"), "allowed: h100"),
        (("plan", str(QUICKSTART), "plan.precison=fp8"), "did you mean plan.precision?"),
        (("plan", str(QUICKSTART), "--gpus", "5", "parallel.tp=2"), "no multiple of tp*pp*cp"),
        (
            ("plan", str(QUICKSTART), "plan.precision=mxfp8"),
            "plan.precision=mxfp8 is not of h100; allowed: fp32",
        ),
        (("plan", str(QUICKSTART), "--png", "/proc/x"), "--png /proc/x cannot be written"),
        (("plan", str(QUICKSTART), "--site", "atlantis"), "known: sakai, tomakomai"),
        (("plan", str(QUICKSTART), "--search", "--objective", "joy"), "allowed: time, tokens_per_j"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_requests_exit_with_2_and_say_what_is_allowed(arguments: tuple[str, ...], said: str) -> None:
    done = moe(*arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_search_of_a_trillion_is_fast_small_and_needs_no_torch() -> None:
    script = (
        "import json, resource, sys\n"
        "from pathlib import Path\n"
        "from moe.planner.command import Request, run_request\n"
        f"request = Request(config=Path({str(KIMI)!r}), overrides=(), gpus=4096, gpu='h100', search=True)\n"
        "text = run_request(request, as_object=True)\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        # Not ru_maxrss: a new process starts with that of the one that started it.
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "peak_kib = int(status['VmHWM'].split()[0])\n"
        "heavy = {'torch', 'numpy', 'megatron', 'matplotlib', 'triton'} & set(sys.modules)\n"
        "cpu_s = usage.ru_utime + usage.ru_stime\n"
        "print(json.dumps([cpu_s, peak_kib, sorted(heavy), json.loads(text)]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    cpu_s, peak_kib, heavy, values = json.loads(done.stdout)
    assert heavy == []
    assert cpu_s <= 10
    assert peak_kib <= 2**20
    assert values["fits"]
    assert values["search"]["fitting"] <= values["search"]["tried"]


def test_search_finds_the_fastest_of_those_that_fit() -> None:
    config = load_plan_config(KIMI, ("train.global_batch_size=1024",))
    found = search(config, searched_job(config, 1024, find_gpu("b200")), site=Site())
    for plan in found.front:
        assert plan.short_bytes == 0
        assert plan.time.step_s >= found.best.time.step_s
    assert any("short by" in one.verdict or "time" in one.verdict for one in found.neighbours)
    frugal = search(
        config, searched_job(config, 1024, find_gpu("b200")), site=Site(), objective="tokens_per_j"
    )
    assert frugal.best.energy.tokens_per_j >= found.best.energy.tokens_per_j


def test_chosen_layout_is_one_that_training_accepts() -> None:
    values = planned(QUICKSTART, gpus=8, search=True)
    chosen = values["search"]["overrides"]
    assert values["search"]["refused_by_train"] == []
    assert load_config(QUICKSTART, chosen, world_size=8).parallel.ep == values["layout"]["ep"]


def test_training_takes_the_layout_that_is_found_even_for_61_layers() -> None:
    values = planned(KIMI, gpus=4096, gpu="h100", search=True)
    assert values["layout"]["pp"] > 1
    assert values["search"]["refused_by_train"] == []


def test_search_of_a_recipe_gives_overrides_that_training_takes() -> None:
    recipe = QUICKSTART.with_name("sovereign-1t-a32b-h100.yaml")
    values = planned(recipe, gpus=4096, gpu="h100", search=True)
    assert values["search"]["refused_by_train"] == []
    for front in [values["search"], *values["search"]["front"]]:
        load_config(recipe, front["overrides"], world_size=4096)


def test_evaluation_is_made_longer_where_it_would_not_fill_the_ranks() -> None:
    config = load_plan_config(KIMI, ("train.eval_sequences=100", "parallel.ep=8", "parallel.pp=8"))
    job = make_job(config, 512, find_gpu("h100"))
    assert (job.layout.dp, as_overrides(config, job)[-1]) == (64, "train.eval_sequences=128")
    chunked = dataclasses.replace(job, layout=dataclasses.replace(job.layout, vpp=2))
    assert as_overrides(config, chunked)[-1] == "train.eval_sequences=512"
    enough = load_plan_config(KIMI, ("train.eval_sequences=128",))
    assert not any("eval" in override for override in as_overrides(enough, job))


def test_layout_that_training_refuses_is_named() -> None:
    ramp = "train.batch_schedule=[{steps: 10, global_batch_size: 7}]"
    values = planned(KIMI, ramp, gpus=512, gpu="h200", search=True)
    (reason,) = values["search"]["refused_by_train"]
    assert "train.batch_schedule has batches of 7" in reason


def test_layouts_that_training_refuses_come_last() -> None:
    """A ramp of the batch that few data-parallel ranks can share out decides against the fastest layout."""
    ramp = "train.batch_schedule=[{steps: 10, global_batch_size: 4}]"
    values = planned(KIMI, ramp, gpus=512, gpu="h200", search=True)
    free = planned(KIMI, gpus=512, gpu="h200", search=True)
    assert values["search"]["refused_by_train"] == []
    assert values["step_s"] > free["step_s"]


def test_a_layout_whose_save_no_host_can_hold_comes_last() -> None:
    small = dataclasses.replace(find_gpu("b300"), host_bytes=64e9)
    config = load_plan_config(KIMI, ("train.global_batch_size=1024",))
    found, free = (
        search(config, searched_job(config, 256, gpu), site=Site()) for gpu in (small, find_gpu("b300"))
    )
    assert free.best.save_bytes is not None and found.best.save_bytes is not None
    assert free.best.save_bytes > small.host_bytes * small.node_gpus
    assert found.best.save_bytes <= found.best.host_bytes
    assert found.best.time.step_s > free.best.time.step_s
    tiny = dataclasses.replace(small, host_bytes=1e9)
    (reason,) = search(config, searched_job(config, 256, tiny), site=Site()).refused
    assert "while it is written" in reason


@pytest.mark.parametrize(
    ("name", "gpus"), [("deepseek-v3-671b", 1024), ("qwen3-30b-a3b", 16), ("gpt-oss-120b", 64)]
)
def test_search_is_never_slower_than_the_recipe_it_was_given(name: str, gpus: int) -> None:
    config = load_plan_config(QUICKSTART.with_name(f"{name}.yaml"))
    job = make_job(config, gpus, find_gpu("h100"))
    assert job.stage_layers
    assert search(config, job, site=Site()).best.time.step_s <= step_time(job).step_s


def test_balanced_chunks_are_as_fast_as_those_that_a_recipe_names() -> None:
    config = load_plan_config(QUICKSTART.with_name("deepseek-v3-671b.yaml"))
    job = make_job(config, 1024, find_gpu("h100"))
    assert job.layout.vpp > 1
    assert step_time(dataclasses.replace(job, stage_layers=())).step_s <= step_time(job).step_s


def test_overrides_say_all_of_a_layout_also_over_a_recipe_with_one_of_its_own() -> None:
    recipe = QUICKSTART.with_name("deepseek-v3-671b.yaml")
    config = load_plan_config(recipe)
    assert config.parallel.vpp > 1
    wanted = Layout(gpus=1024, tp=1, pp=8, vpp=1, ep=8)
    job = dataclasses.replace(
        searched_job(config, 1024, find_gpu("h100")), layout=wanted, stage_layers=(), micro_batch=2
    )
    again = make_job(load_plan_config(recipe, as_overrides(config, job)), 1024, find_gpu("h100"))
    assert (again.layout, again.stage_layers, again.micro_batch) == (wanted, (), 2)


def test_what_cannot_fit_says_by_how_many_bytes() -> None:
    config = load_plan_config(KIMI)
    with pytest.raises(InputError, match=r"short by [\d,]+ bytes"):
        search(config, searched_job(config, 64, find_gpu("h100")), site=Site())
    values = planned(KIMI, "parallel.ep=8", gpus=64)
    assert not values["fits"]
    assert values["short_bytes"] > 2**30


def test_what_if_compares_one_change() -> None:
    values = planned(KIMI, "parallel.ep=64", "parallel.pp=8", gpus=512, what_if=["plan.recompute=[full]"])
    (changed,) = values["what_if"]
    assert changed["memory_gib_worst_rank"] < values["memory_gib_worst_rank"]
    assert changed["step_s"] > values["step_s"]


def test_experts_alone_can_be_quantised() -> None:
    layout = ("parallel.ep=64", "parallel.pp=8")
    wide = planned(KIMI, *layout, gpus=512)
    narrow = planned(KIMI, *layout, "model.expert_precision=fp8", gpus=512)
    everywhere = planned(KIMI, *layout, "plan.precision=fp8", gpus=512)
    assert everywhere["step_s"] < narrow["step_s"] < wide["step_s"]
    # Our experts quantise their input in each direction, so it is kept as it came; H may be kept in 8 bits.
    stored = planned(
        KIMI, *layout, "model.expert_precision=fp8", "model.expert_fp8_input_store=true", gpus=512
    )
    mixed = planned(
        KIMI, *layout, "model.expert_precision=fp8", "model.expert_wide_into_activation=true", gpus=512
    )
    assert narrow["step_s"] < mixed["step_s"] < wide["step_s"]
    memory = "memory_gib_worst_rank"
    assert everywhere[memory] < wide[memory] <= narrow[memory] > stored[memory]
    with pytest.raises(InputError, match=r"model\.expert_precision=mxfp8 is not of h100"):
        planned(KIMI, *layout, "model.expert_precision=mxfp8", gpus=512)


DEEPSPEED = ("engine.name=deepspeed", "engine.zero_stage=2")


def test_offload_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"engine\.offload=optimizer cannot be planned"):
        planned(QUICKSTART, *DEEPSPEED, "engine.offload=optimizer")


def test_nothing_recomputed_is_not_what_the_recipe_recomputes() -> None:
    full, none = (
        planned(QUICKSTART, "train.recompute=full", *more, gpus=1) for more in ((), ("plan.recompute=[]",))
    )
    assert none["memory_gib_worst_rank"] > full["memory_gib_worst_rank"]
    assert none["step_s"] == planned(QUICKSTART, "train.recompute=none", gpus=1)["step_s"]


def test_only_the_engine_that_gathers_a_save_on_hosts_says_what_it_takes() -> None:
    texts = [
        run_request(Request(config=QUICKSTART, overrides=more, gpus=2, gpu="h100"), as_object=False)
        for more in ((), DEEPSPEED)
    ]
    assert ["A checkpoint takes" in text for text in texts] == [True, False]
    assert planned(QUICKSTART, *DEEPSPEED, gpus=2)["save_host_gib_per_node"] is None


def test_site_limits_gpus_by_power() -> None:
    values = planned(KIMI, "parallel.ep=64", "parallel.pp=8", gpus=512, site="tomakomai")
    run, energy = values["campaign"], values["energy"]
    watts_each = energy["facility_w"] / 512
    assert run["site_gpus"] == int(50e6 / watts_each)
    assert run["t_co2"] == pytest.approx(run["mwh"] * 0.485)  # Japan's: no source states the site's own
    assert "grid_g_per_kwh" in values["site"]["assumed"]
    assert values["site"]["name"] == "Tomakomai"


def test_site_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("name: Here\npue: {value: 0.9, source: ours}\nyen_per_kwh: 12\n")
    with pytest.raises(
        InputError, match=r"pue.value: .*greater than or equal to 1; yen_per_kwh: got 12; a figure"
    ):
        load_site(str(path))
    path.write_text("name: Here\npower_w: {value: 1e6, source: ours}\n")
    assert load_site(str(path)).power_w == 1e6


def test_site_without_a_figure_is_planned_with_an_assumption_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("name: Here\npue: {value: 1.1, source: our meters of 2026}\nyen_per_kwh: unknown\n")
    site = load_site(str(path))
    assert (site.pue, site.yen_per_kwh) == (1.1, Site().yen_per_kwh)
    assert site.assumed == ("grid_g_per_kwh", "yen_per_kwh", "yen_per_gpu_hour")
    request = Request(config=QUICKSTART, overrides=(), gpus=2, gpu="h100", site=str(path))
    text = run_request(request, as_object=False)
    assert "grid_g_per_kwh, yen_per_kwh, yen_per_gpu_hour" in text


def test_machine_file_changes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "h800.yaml"
    path.write_text("base: h100\nnvlink_bytes_per_s: 200e9\nefficiency:\n  gemm_bf16: 0.5\n")
    gpu, base = find_gpu(str(path)), find_gpu("h100")
    assert (gpu.name, gpu.nvlink_bytes_per_s, gpu.efficiency.gemm_bf16) == ("h800", 200e9, 0.5)
    assert (gpu.tdp_w, gpu.efficiency.hbm, gpu.peak_flops) == (
        base.tdp_w,
        base.efficiency.hbm,
        base.peak_flops,
    )
    slower, faster = (planned(QUICKSTART, gpus=2, gpu=name)["step_s"] for name in (str(path), "h100"))
    assert slower > faster


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: h99\n", "base=h99 must be one of h100"),
        ("base: h100\nnvlink: 1\n", "unknown key nvlink; allowed: memory_bytes"),
        ("base: h100\ntdp_w: -1\n", "tdp_w=-1 must be a number above 0"),
        ("base: h100\nefficiency: {hbm: 1.5}\n", "at most 1"),
        ("base: h100\nefficiency: 0.5\n", "must be a section"),
        ("base: b200\nname: h100\n", "h100 is a kind that the planner knows"),
    ],
)
def test_machine_file_is_checked(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        find_gpu(str(path))


def test_pictures_are_drawn(tmp_path: Path) -> None:
    values = planned(QUICKSTART, search=True, png=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.png", "pareto.png", "step.png"]
    assert len(values["pictures"]) == 3


def test_text_says_the_same_as_the_object() -> None:
    text = run_request(
        Request(config=QUICKSTART, overrides=(), gpus=1, gpu="h100", what_if=["plan.recompute=[moe_act]"]),
        as_object=False,
    )
    assert "extrapolated" in text
    assert "plan.recompute=[moe_act]" in text
    assert "Attack next" in text


def test_validation_as_an_object() -> None:
    values = json.loads(
        run_request(Request(config=None, overrides=(), gpus=1, gpu="h100", validate=True), as_object=True)
    )
    assert len(values["rows"]) == values["summary"]["rows"]
    assert len(values["rows_held_out"]) == values["summary_held_out"]["rows"]
    assert len(values["rows_examined"]) == values["summary_examined"]["rows"]
    rows = [*values["rows"], *values["rows_held_out"], *values["rows_examined"], *values["rows_assuming"]]
    assert all({"id", "step_error", "measured_step_s", "step_s"} <= row.keys() for row in rows)
    assert all(row["assumes"] for row in values["rows_assuming"])


def test_evidence_is_calibrated_only_where_runs_are_alike() -> None:
    alike = ("parallel.ep=64", "parallel.pp=8", "plan.kernels=te", "plan.precision=bf16")
    balanced = planned(KIMI, *alike, "plan.routing=balanced", gpus=512)["evidence"]["step_s"]
    natural = planned(KIMI, *alike, gpus=512)["evidence"]["step_s"]
    other_gpu = planned(KIMI, *alike, "plan.routing=balanced", gpus=512, gpu="h200")["evidence"]["step_s"]
    assert [one["level"] for one in (balanced, natural, other_gpu)] == ["calibrated", *["extrapolated"] * 2]
    width = [one["high"] / one["low"] for one in (balanced, natural, other_gpu)]
    assert width[0] < min(width[1:])


def test_plan_of_a_search_can_be_planned_again() -> None:
    values = planned(KIMI, gpus=4096, search=True)
    again = planned(KIMI, *values["search"]["overrides"], gpus=4096)
    assert again["step_s"] == pytest.approx(values["step_s"])


def test_a_hundred_plans_take_less_than_a_second() -> None:
    config = load_plan_config(KIMI, ("parallel.ep=64", "parallel.pp=8"))
    job = make_job(config, 512, find_gpu("h100"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    for _ in range(100):
        step_time(job)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 1.0
