"""The command: weights come in, train, and go out; what is printed; how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hf_models import make_model, random_model, same_bytes, save_model, tensors_of
from train_runs import REPOSITORY, command, environment, run
from typer.testing import CliRunner

from moe.cli import app
from moe.config.schema import ModelSection
from moe.errors import InputError
from moe.train.initial_weights import check_initial_weights

QUIET_RUN = (
    "train.steps=1",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.eval_sequences=4",
    "data.seq_length=16",
    "tracking.wandb=disabled",
    "optim.lr=1e-30",  # a step that changes no weight
    "optim.min_lr=0",
    "optim.warmup_steps=0",
)


def convert(*arguments: str | Path) -> str:
    """What `moe convert` prints on stdout, in this process."""
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, imported as `ours` by the command, and `recipe.yaml` with its model."""
    folder = tmp_path_factory.mktemp("command")
    save_model(make_model("qwen3_moe", "even", seed=8, vocab_size=4096), folder / "hf")
    said = convert("import", folder / "hf", folder / "ours")
    assert f"{folder / 'ours'}: written, logits of 64 tokens equal those of transformers to" in said
    recipe = yaml.safe_load((REPOSITORY / "configs" / "quickstart.yaml").read_text())
    recipe |= yaml.safe_load((folder / "ours" / "model.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_imported_weights_train_and_export_as_they_were(folder: Path, tmp_path: Path) -> None:
    said = run(
        command(
            "train",
            str(folder / "recipe.yaml"),
            f"train.init_from={folder / 'ours'}",
            *QUIET_RUN,
            *("parallel.ep=2", "--nproc", "2", "--run-dir", str(tmp_path / "run")),
        )
    )
    assert f"starting from the weights of {folder / 'ours'}" in said
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    said = convert("export", checkpoint, tmp_path / "hf")  # one family fits, so none need be named
    assert f"{tmp_path / 'hf'}: written, logits of 64 tokens equal" in said
    assert same_bytes(tensors_of(folder / "hf"), tensors_of(tmp_path / "hf")) == []


def test_another_model_is_not_started_from(folder: Path) -> None:
    held = ModelSection.model_validate(yaml.safe_load((folder / "ours" / "model.yaml").read_text())["model"])
    check_initial_weights(folder / "ours", held)
    with pytest.raises(InputError, match=r"holds another model: model\.top_k is 3, 2 there"):
        check_initial_weights(folder / "ours", held.model_copy(update={"top_k": 3}))


def test_check_says_what_was_compared(folder: Path) -> None:
    said = convert("check", folder / "hf", folder / "ours")
    assert "95 tensors, equal bit for bit; logits of 64 tokens equal" in said
    unchecked = convert("check", folder / "hf", folder / "ours", "--unchecked", "--json")
    assert json.loads(unchecked) == {"tensors": 95, "logits": None}


def test_unchecked_conversion_says_so(folder: Path, tmp_path: Path) -> None:
    assert "written, logits unchecked" in convert("import", folder / "hf", tmp_path / "ours", "--unchecked")


@pytest.mark.parametrize("verb", ["import", "export", "check", "upcycle"])
def test_what_is_not_installed_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    options = ["--experts", "4", "--top-k", "2"] if verb == "upcycle" else []
    (tmp_path / "b").mkdir()
    argv = ["convert", verb, str(tmp_path), str(tmp_path / "b"), *options]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        InputError, match=r"needs transformers: pip install 'joulemoe\[convert\]'; .*--unchecked"
    ):
        CliRunner().invoke(app, argv, catch_exceptions=False)
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(InputError, match=r"needs megatron: pip install 'joulemoe\[convert\]'$"):
        CliRunner().invoke(app, [*argv, "--unchecked"], catch_exceptions=False)


# About 200 MB each; Qwen's tensors are small, gpt-oss's have all experts of a layer in one.
LARGE = {
    "qwen3_moe": {"hidden_size": 768, "vocab_size": 4096, "moe_intermediate_size": 384, "num_experts": 16},
    "gpt_oss": {"hidden_size": 512, "intermediate_size": 512, "num_local_experts": 16},
}
MEASURE = """
import sys
from pathlib import Path
from moe.convert.import_hf import import_hf
from moe.convert.export_hf import export_hf
from moe.convert.upcycle import Upcycling, upcycle
import moe.engine.one_rank

def status_bytes(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

def growth(convert):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_bytes("VmRSS:")
    convert()
    return status_bytes("VmHWM:") - before

folder = Path(sys.argv[1])
quiet = {"check_logits": False, "note": str}
if len(sys.argv) > 2:
    upcycle(folder / "warm", folder / "warm_ours", Upcycling(4, 2, 2), **quiet)
    print(growth(lambda: upcycle(folder / "hf", folder / "ours", Upcycling(16, 4, 2), **quiet)))
    raise SystemExit
import_hf(folder / "warm", folder / "warm_ours", **quiet)
export_hf(folder / "warm_ours", folder / "warm_back", family=None, **quiet)
print(growth(lambda: import_hf(folder / "hf", folder / "ours", **quiet)))
print(growth(lambda: export_hf(folder / "ours", folder / "back", family=None, **quiet)))
"""


@pytest.mark.parametrize("family", [pytest.param("qwen3_moe", marks=pytest.mark.slow), "gpt_oss"])
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path, family: str) -> None:
    save_model(make_model(family, "even", seed=9), tmp_path / "warm")
    folder = save_model(make_model(family, "even", seed=9, **LARGE[family]), tmp_path / "hf")
    tensors = tensors_of(folder)
    largest, total = max(t.nbytes for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    assert total > 2 * largest + 2**26 + 2**25  # whoever holds the whole model is seen
    argv = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=True)
    growth = [int(number) for number in done.stdout.split()]
    assert same_bytes(tensors, tensors_of(tmp_path / "back")) == []
    assert len(growth) == 2
    assert max(growth) < 2 * largest + 2**26, (growth, largest, total)


@pytest.mark.slow
def test_memory_of_upcycling_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
    small = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 96}
    large = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096}
    save_model(random_model("LlamaConfig", sizes | small, seed=0), tmp_path / "warm")
    folder = save_model(random_model("LlamaConfig", sizes | large, seed=0), tmp_path / "hf")
    largest = max(t.nbytes for t in tensors_of(folder).values())
    argv = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path), "upcycle"]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=True)
    written = sum(file.stat().st_size for file in (tmp_path / "ours").glob("*.distcp"))
    assert written > 2**28  # whoever holds a layer's experts, or the model, is seen
    assert int(done.stdout) < 2 * largest + 2**25, (done.stdout, largest, written)
