"""What a finished run leaves behind, training on own text, and damaged text refused before the first step."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from train_runs import command, environment, metrics, run, train_command

from moe.config import load_config
from moe.counts.counts import flops_per_token, params_active, params_total
from moe.counts.shape import shape_of
from moe.data.indexed import bin_path

METRIC_FIELDS = {
    "step",
    "loss",
    "grad_norm",
    "tokens",
    "tokens_per_s",
    "lr",
    "expert_load_max_over_mean",
    "energy_j",
    "power_w",
}
REPORT_FIELDS = {
    "run",
    "commit",
    "steps",
    "tokens",
    "params_total",
    "params_active",
    "flops_per_token",
    "loss_first",
    "loss_last",
    "heldout_loss",
    "heldout_bits_per_byte",
    "tokens_per_s",
    "wall_s",
    "layout",
    "engine",
    "device",
    "energy",
    "tokens_per_j",
}


def test_report_says_what_was_done(reference_run: Path) -> None:
    report = json.loads((reference_run / "report.json").read_text())
    config = load_config(reference_run / "config.yaml")
    shape = shape_of(config.model)
    assert report.keys() >= REPORT_FIELDS
    assert report["steps"] == 20
    assert report["tokens"] == 20 * 8 * 64
    assert report["params_total"] == params_total(shape)
    assert report["params_active"] == params_active(shape) < report["params_total"]
    assert report["flops_per_token"] == flops_per_token(shape, 64)
    assert report["loss_first"] > report["loss_last"] > 0
    assert report["layout"] == {"tp": 1, "pp": 1, "ep": 1, "cp": 1, "dp": 1, "etp": 1}
    assert {"source", "boundary", "total_j", "idle_w"} <= report["energy"].keys()
    assert report["tokens_per_j"] == pytest.approx(report["tokens"] / report["energy"]["total_j"])
    if report["energy"]["source"] == "estimated":
        assert "estimated, not measured" in report["energy"]["description"]


def test_metrics_have_one_object_a_step(reference_run: Path) -> None:
    records = metrics(reference_run)
    assert [record["step"] for record in records] == list(range(1, 21))
    assert all(record.keys() >= METRIC_FIELDS for record in records)
    energies = [record["energy_j"] for record in records]
    assert energies == sorted(energies) and energies[0] > 0
    assert records[-1]["heldout_bits_per_byte"] > 0


def test_pictures_are_drawn(reference_run: Path) -> None:
    pictures = {path.name for path in (reference_run / "plots").glob("*.png")}
    assert pictures == {"loss.png", "expert_load.png", "power.png"}


@pytest.fixture(scope="module")
def own_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared Japanese and English text: train and heldout prefixes."""
    folder = tmp_path_factory.mktemp("text")
    for name, lines in {"train": 300, "heldout": 60}.items():
        text = "\n".join(f"{name} {i}: 専門家の混合は、計算を増やさずに容量を増やす。" for i in range(lines))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        source, prefix = str(folder / f"{name}.txt"), str(folder / name)
        run(command("data", "prepare", "--input", source, "--tokenizer", "bytes", "--out", prefix))
    return folder


def own_text_overrides(folder: Path) -> list[str]:
    return [
        "data.tokenizer=bytes",
        "model.vocab_size=260",
        f"data.train=[{{prefix: {folder / 'train'}, weight: 2}}]",
        f"data.heldout=[{{prefix: {folder / 'heldout'}}}]",
        f"data.cache_dir={folder / 'cache'}",
        "train.steps=3",
    ]


def test_own_text_trains_and_the_tracker_stays_offline(own_text: Path, tmp_path: Path) -> None:
    more = ["tracking.wandb=offline", "energy.meter=estimate", "optim.qk_clip=100"]
    output = run(train_command(tmp_path / "run", *own_text_overrides(own_text), *more))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    # One byte a token, so a loss in nats is the same in bits per byte.
    assert report["heldout_bits_per_byte"] == pytest.approx(report["heldout_loss"] / 0.6931472, rel=1e-2)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert_called_an_estimate(tmp_path / "run", output)
    assert_largest_logit_is_shown(tmp_path / "run", output)


def assert_largest_logit_is_shown(run_dir: Path, output: str) -> None:
    """Where QK-clip acts, wherever the loss is."""
    assert all(0 < record["max_attention_logit"] < 100 for record in metrics(run_dir))
    assert re.search(r"step 3/3  loss .*  logit \d+\.\d  ", output)
    (tracked,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    assert b"max_attention_logit" in tracked.read_bytes()


def assert_called_an_estimate(run_dir: Path, output: str) -> None:
    """An estimate must be called one wherever a figure of energy appears."""
    progress = [line for line in output.splitlines() if line.startswith("step") and "loss" in line]
    assert all("W est." in line and "tokens/J (estimated)" in line for line in progress if "tokens/s" in line)
    assert "energy: estimated, not measured" in output
    assert "J est." in output
    assert {record["energy_source"] for record in metrics(run_dir)} == {"estimated"}
    energy = json.loads((run_dir / "report.json").read_text())["energy"]
    assert (energy["source"], energy["levels"][0]["basis"]) == ("estimated", "estimated")
    assert {level["basis"] for level in energy["levels"]} <= {"estimated", "unknown"}
    assert "estimate" in energy["validity_detail"]
    assert b"ESTIMATED" in (run_dir / "plots" / "power.png").read_bytes()
    (tracked,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    assert b"energy_source" in tracked.read_bytes()
    assert b"estimated" in tracked.read_bytes()
    lines = (run_dir / "energy.jsonl").read_text().splitlines()
    assert all(json.loads(line)["source"] == "estimated" for line in lines)


@pytest.mark.parametrize("damage", ["truncated", "id beyond the vocabulary"])
def test_damaged_text_is_refused_before_the_first_step(own_text: Path, tmp_path: Path, damage: str) -> None:
    damaged = bin_path(own_text / "heldout")
    intact = damaged.read_bytes()
    bad_id = intact[:10] + b"\xff\xff" + intact[12:]
    damaged.write_bytes(intact[:-7] if damage == "truncated" else bad_id)
    argv = train_command(tmp_path / "run", *own_text_overrides(own_text))
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    damaged.write_bytes(intact)
    assert done.returncode == 3, done.stderr[-2000:]
    assert str(damaged) in done.stderr
    assert "offset" in done.stderr or "bytes" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
