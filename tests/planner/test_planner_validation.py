"""The published table: errors within bounds, and nothing in the planner that knows a row."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moe.planner import hardware
from moe.planner.evidence import memory_reach, time_reach
from moe.planner.ops import layer_ops
from moe.planner.plan import as_json, make_plan
from moe.planner.report import validation_text
from moe.planner.settings import Job, PlanSection
from moe.planner.step import step_time
from moe.planner.validate import Comparison, compare_all, published_config, published_rows, summary, validate

PLANNER = Path(hardware.__file__).parent
# Words of the names of published models and runs.
NAMES = (
    "deepseek",
    "kimi",
    "qwen",
    "glm",
    "olmo",
    "mixtral",
    "llm-jp",
    "llm_jp",
    "ling-1t",
    "gpt-oss",
    "llama",
)


def test_step_times_and_memory_are_within_the_stated_errors() -> None:
    numbers = summary(validate())
    assert numbers["rows"] >= 19
    assert numbers["step_median_abs_error"] <= 0.08
    assert numbers["step_worst_abs_error"] <= 0.20
    assert numbers["memory_worst_abs_error"] <= 0.02


def test_every_row_of_the_source_is_here_or_says_why_not() -> None:
    numbers = {row.id.split()[0].rstrip("abcd") for row in published_rows() if row.table == "rows"}
    assert numbers == {"1", "2", "3", "4", "5", "7", "9", "11", "13", "14", "16", "19", "22", "23", "24"}
    assert all(row.missing or row.step_s or row.tokens_per_s_per_gpu for row in published_rows())


def held_out() -> tuple[Comparison, ...]:
    return tuple(one for one in compare_all() if one.row.table == "held_out")


def test_runs_held_out_are_planned_as_well() -> None:
    numbers = summary(held_out())
    assert numbers["rows"] >= 11
    assert numbers["step_median_abs_error"] <= 0.08
    assert numbers["step_worst_abs_error"] <= 0.20
    assert numbers["memory_worst_abs_error"] is None  # none publishes it, which is no error of 0


def test_a_run_held_out_that_repeats_a_fitted_one_says_so() -> None:
    fitted = {setting(one): one.row.id.split()[0] for one in validate()}
    same = {one.row.id: fitted[setting(one)] for one in held_out() if setting(one) in fitted}
    assert same == {one.row.id: one.row.repeats for one in held_out() if one.row.repeats}
    assert len(same) == 2


def setting(one: Comparison) -> tuple[object, ...]:
    return one.row.config, one.job.shape, one.row.gpu, one.job.layout, one.job.precision


def test_runs_held_out_need_no_term_that_others_showed_to_be_missing() -> None:
    """plan.overlap_tp came with Llama's recipes, Muon's terms with Kimi K2's, unfused biases with gpt-oss."""
    for one in held_out():
        assert not one.job.plan.overlap_tp
        assert not one.job.muon
        assert not one.job.shape.expert_bias
    examined = [one.job for one in compare_all() if one.row.table == "examined"]
    assert any(job.plan.overlap_tp for job in examined)
    assert any(job.muon for job in examined)


@pytest.mark.parametrize("one", compare_all(), ids=lambda one: one.row.id.split()[0])
def test_a_run_lies_in_the_interval_of_its_plan(one: Comparison) -> None:
    plan = make_plan(one.job, 1)
    values = as_json(plan)
    levels = values["evidence"]
    measured = {"step_s": one.measured_s, "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu}
    measured["tokens_per_s_per_gpu"] *= one.planned_s / one.measured_s
    if one.row.memory_gib:
        measured["memory_gib_worst_rank"] = one.row.memory_gib
        assert levels["memory_gib_worst_rank"]["level"] == "calibrated"
    for name, value in measured.items():
        interval = levels[name]
        assert interval["low"] * (1 - 1e-9) <= value <= interval["high"] * (1 + 1e-9), name
        assert interval["low"] < values[name] * (1 + 1e-9)
    assert levels["step_s"]["level"] == ("extrapolated" if one.row.assumes else "calibrated")


@pytest.mark.parametrize("one", validate(), ids=lambda one: one.row.id.split()[0])
def test_what_is_extrapolated_reaches_farther_than_what_is_calibrated(one: Comparison) -> None:
    job = one.job
    reaches = [time_reach(other) for other in (job, *unlike(job))]
    assert [reach.alike for reach in reaches] == [True, *[False] * (len(reaches) - 1)]
    rows = [other for other in compare_all() if other.job.gpu == job.gpu and not other.row.assumes]
    worst = [abs(other.measured_s / other.planned_s - 1) for other in rows]
    for reach in reaches[1:]:
        assert reach.low <= reaches[0].low and reach.high >= reaches[0].high
        assert max(reach.high - 1, 1 / reach.low - 1) >= 2 * max(worst) * 0.99


def unlike(job: Job) -> tuple[Job, ...]:
    """The same run, so that no published one is alike."""
    far = replace(job.layout, gpus=64 * 1024)
    plan = job.plan.model_copy
    return (
        replace(job, plan=plan(update={"kernels": "ours"})),
        replace(job, plan=plan(update={"routing": "natural"})),
        replace(job, layout=far, global_batch=job.global_batch * 256),
        replace(job, layout=replace(job.layout, cp=2)),
    )


def test_muon_and_dense_models_are_not_like_runs_of_others() -> None:
    (run,) = (one.job for one in validate() if one.row.id.startswith("1 "))
    dense = replace(run.shape, num_experts=1, top_k=1)
    assert time_reach(run).alike
    assert not time_reach(replace(run, muon=True)).alike
    assert not time_reach(replace(run, shape=dense)).alike


def test_a_machine_file_is_not_the_gpu_that_it_differs_from() -> None:
    (run,) = (one.job for one in validate() if one.row.id.startswith("14 "))
    assert time_reach(run).alike
    assert not time_reach(replace(run, gpu=replace(run.gpu, tdp_w=500.0))).alike


def test_memory_is_calibrated_only_by_runs_that_keep_alike() -> None:
    (run,) = (one.job for one in validate() if one.row.id.startswith("14 "))
    assert memory_reach(run).alike
    others = (
        replace(run, recompute=("full",)),
        replace(run, muon=True),
        replace(run, precision="fp8"),
        replace(run, layout=replace(run.layout, pp=2)),
        replace(run, plan=run.plan.model_copy(update={"kernels": "ours"})),
    )
    assert not any(memory_reach(other).alike for other in others)


def test_exposed_communication_is_never_certain() -> None:
    for one in validate():
        interval = as_json(make_plan(one.job, 1))["evidence"]["exposed_comm_s"]
        assert interval["level"] == "extrapolated"
        assert interval["high"] > interval["low"] >= 0


def test_runs_that_ran_fit_or_are_shown_as_an_error() -> None:
    text = validation_text(compare_all(), published_rows())
    short = [one for one in compare_all() if one.short_gib]
    for one in short:
        assert f"{one.row.id}: ran, but is short by {one.short_gib:.1f} GiB here" in text
        # Within what the interval of memory says.
        assert one.short_gib * 2**30 < 0.10 * one.job.gpu.memory_bytes
    assert not any(one.row.table == "rows" for one in short)
    assert summary(tuple(short) or validate())["do_not_fit"] == len(short)


def test_only_the_first_table_counts_and_only_rows_that_assume_nothing() -> None:
    assert {one.row.table for one in validate()} == {"rows"}
    assert not any(one.row.assumes for one in validate())
    assumed = {one.row.id.split()[0] for one in compare_all() if one.row.assumes}
    assert assumed == {"23a", "23b"}


def test_each_expert_costs_launches_where_kernels_are_unfused() -> None:
    """Qwen3-235B on B200 with 16 experts a rank: the GPU waits where a micro-batch is one sequence."""
    (run,) = (one for one in compare_all() if one.row.id.startswith("h12 "))
    fused = replace(run.job, plan=run.job.plan.model_copy(update={"kernels": "te_fused"}))
    launches = [
        [op.launches for op in layer_ops(job, dense=False) if op.of_experts and op.kind == "gemm"]
        for job in (run.job, fused)
    ]
    assert launches == [[16, 16], [1, 1]]
    assert step_time(run.job).spent.launch_s > 0.05 * run.planned_s
    assert step_time(fused).spent.launch_s < 0.5 * step_time(run.job).spent.launch_s
    waiting = [one.job for one in compare_all() if step_time(one.job).spent.launch_s]
    assert all(job.plan.kernels == "te" and not job.plan.overlap_ep for job in waiting)


def test_weak_scaling_is_flat_as_it_was_measured() -> None:
    times = [one.planned_s for one in validate() if one.row.id.startswith("16")]
    assert len(times) == 4
    assert max(times) / min(times) < 1.02


def test_errors_are_printed_row_by_row() -> None:
    text = validation_text(validate(), published_rows())
    for comparison in validate():
        assert comparison.row.id in text
        assert f"{comparison.step_error:+.1%}" in text
    for row in published_rows():
        assert not row.missing or row.missing in text


def test_a_published_recipe_names_its_source() -> None:
    for path in PLANNER.glob("published/*.yaml"):
        assert path.read_text().startswith("# "), path
    assert published_config("kimi_k2").exists()


def code_strings(tree: ast.Module) -> Iterator[str]:
    """String constants and names, docstrings excluded."""
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def row_words(source: str) -> list[str]:
    """What in a module names a published model."""
    strings = code_strings(ast.parse(source))
    return [text for text in strings if any(name in text.lower() for name in NAMES)]


@pytest.mark.parametrize("path", sorted(PLANNER.glob("*.py")), ids=lambda path: path.stem)
def test_no_code_knows_a_published_model(path: Path) -> None:
    assert row_words(path.read_text()) == []


def test_planted_row_constant_is_found() -> None:
    assert row_words('"""DeepSeek"""\nFACTOR = {"Qwen3-30B": 1.1}') == ["Qwen3-30B"]


def test_a_plan_depends_on_sizes_and_never_on_a_name() -> None:
    # What decides a plan has no name of a model or a run: the only text is choices and the kind of GPU.
    fields = {field.name for field in dataclasses.fields(Job)}
    assert fields == {
        "shape",
        "gpu",
        "layout",
        "seq_length",
        "global_batch",
        "micro_batch",
        "precision",
        "expert_precision",
        "fp8_input_store",
        "wide_into_activation",
        "plan",
        "stage_layers",
        "recompute",
        "zero",
        "overlap_grads",
        "overlap_params",
        "muon",
    }
    assert "name" not in PlanSection.model_fields


def test_there_is_one_set_of_constants_for_each_kind_of_gpu() -> None:
    assert sorted(hardware.GPUS) == ["b200", "b300", "gb200", "gb300", "h100", "h200"]
    for gpu in hardware.GPUS.values():
        for field in dataclasses.fields(gpu.efficiency):
            assert 0 < getattr(gpu.efficiency, field.name) < 1
    with pytest.raises(TypeError):
        hardware.GPUS["h100"] = hardware.GPUS["h200"]  # type: ignore[index]
