"""The README's numbers are those of the result files, and its example runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.readme_table import rewritten
from moe.config import RunConfig, load_config

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
RESULTS = REPOSITORY / "benchmarks" / "results"


def result(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_measured_table_is_that_of_the_result_file():
    report = result("2026-11-23-cpu-quickstart.json")["report"]
    rows = [
        f"| parameters, active for a token | {report['params_total']:,}, {report['params_active']:,} |",
        f"| training loss of the first step | {report['loss_first']:.4f} |",
        f"| held-out loss at the end | {report['heldout_loss']:.4f} |",
        f"| held-out bits per byte | {report['heldout_bits_per_byte']:.4f} |",
        f"| tokens/s | {report['tokens_per_s']:,.0f} |",
        f"| tokens/J ({report['energy']['source']}, {report['energy']['boundary']}) | "
        f"{report['tokens_per_j']:.0f} |",
    ]
    assert [row for row in rows if row not in README] == []
    assert report["loss_first"] - report["heldout_loss"] >= 2.0


def test_quick_start_is_the_recipe_that_was_measured():
    measured = result("2026-11-23-cpu-quickstart.json")["config"]  # keys of later versions at their defaults
    recipe = load_config(REPOSITORY / "configs" / "quickstart.yaml")
    assert RunConfig.model_validate_json(json.dumps(measured), strict=True) == recipe
    assert recipe.model.num_experts >= 16
    assert recipe.model.top_k >= 2
    assert recipe.model.shared_expert_hidden_size > 0


def test_errors_of_the_planner_are_those_of_the_result_file():
    # moe plan --validate --json > benchmarks/results/plan-validation.json
    results = result("plan-validation.json")
    errors, held_out = results["summary"], results["summary_held_out"]
    sentence = (
        f"{errors['rows']} rows the step time is off by {100 * errors['step_median_abs_error']:.1f} % in the "
        f"median and {100 * errors['step_worst_abs_error']:.1f} % at worst, memory by at most "
        f"{100 * errors['memory_worst_abs_error']:.1f} %"
    )
    assert sentence in README
    sentence = (
        f"{held_out['rows']} published runs that had no part in any constant or term of step times it is "
        f"{100 * held_out['step_median_abs_error']:.1f} % and "
        f"{100 * held_out['step_worst_abs_error']:.1f} %, though "
        f"{sum(row['repeats'] is not None for row in results['rows_held_out'])} of them have model, GPU and "
        "layout of a fitted run"
    )
    assert sentence in README
    examined = results["summary_examined"]
    sentence = (
        f"{examined['rows']} more showed terms that were missing, one of them chose a factor, and they are "
        f"off by {100 * examined['step_median_abs_error']:.1f} % in the median and "
        f"{100 * examined['step_worst_abs_error']:.1f} % at worst"
    )
    assert sentence in README
    biased = [100 * row["step_error"] for row in results["rows_examined"] if "gpt-oss" in row["id"]]
    assert max(biased) < 0
    assert f"gpt-oss-120b is planned {-max(biased):.0f} to {-min(biased):.0f} % too fast" in README
    kinds = [rows for name, rows in results.items() if name.startswith("rows")]
    short = [row for rows in kinds for row in rows if row["short_gib"]]
    sentence = f"{len(short)} of the runs do not fit by the planner, though they ran"
    assert (sentence in README) == bool(short)


def test_generated_tables_are_those_of_the_result_files():
    # python -m benchmarks.readme_table --write
    assert rewritten(README, RESULTS) == README


def examples() -> list[dict]:
    """What each Python example of the README defines when it runs."""
    found = []
    for example in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        names: dict = {}
        exec(compile(example, "README.md", "exec"), names)
        found.append(names)
    return found


def test_examples_run():
    layer, kernels, hugging_face = examples()
    layer["loss"].backward()
    assert layer["layer"].router.weight_ED.grad.abs().sum() > 0
    assert kernels["y_TD"].shape == kernels["x_TD"].shape and kernels["y_TD"].isfinite().all()
    assert hugging_face["model"].config._experts_implementation == "moe"


def test_folders_of_the_map_exist():
    folders = re.findall(r"^\| `(\w+)/` \|", README, flags=re.MULTILINE)
    assert len(folders) == 6
    assert [folder for folder in folders if not (REPOSITORY / folder).is_dir()] == []
