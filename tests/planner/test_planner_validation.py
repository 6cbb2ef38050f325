"""The published table: errors within bounds, and nothing in the planner that knows a row."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moe.planner import hardware
from moe.planner.ops import layer_ops
from moe.planner.report import validation_text
from moe.planner.settings import Job, PlanSection
from moe.planner.step import step_time
from moe.planner.validate import compare_all, published_config, published_rows, summary, validate

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


def test_runs_held_out_are_planned_as_well() -> None:
    held_out = tuple(one for one in compare_all() if one.row.table == "held_out")
    numbers = summary(held_out)
    assert numbers["rows"] >= 19
    assert numbers["step_median_abs_error"] <= 0.08
    assert numbers["step_worst_abs_error"] <= 0.20
    fitted = {(one.row.config, one.row.gpu, one.measured_s) for one in validate()}
    assert not fitted & {(one.row.config, one.row.gpu, one.measured_s) for one in held_out}


def test_only_the_first_table_counts_and_only_rows_that_assume_nothing() -> None:
    assert {one.row.table for one in validate()} == {"rows"}
    assert not any(one.row.assumes for one in validate())
    assumed = {one.row.id.split()[0] for one in compare_all() if one.row.assumes}
    assert assumed == {"23a", "23b"}


def test_each_expert_costs_launches_where_kernels_are_unfused() -> None:
    """Qwen3-235B on B200 with 16 experts a rank: Python is the limit where a micro-batch is one sequence."""
    (run,) = (one for one in compare_all() if one.row.id.startswith("h12 "))
    fused = replace(run.job, plan=run.job.plan.model_copy(update={"kernels": "te_fused"}))
    launches = [
        [op.launches for op in layer_ops(job, dense=False) if op.of_experts and op.kind == "gemm"]
        for job in (run.job, fused)
    ]
    assert launches == [[16, 16], [1, 1]]
    assert step_time(run.job).spent.launch_s > 0.1 * run.planned_s
    assert step_time(fused).spent.launch_s == 0


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
