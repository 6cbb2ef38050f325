"""Losing a rank, resuming, changing the layout, damaged checkpoints: on real runs of the command."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from checkpoint_tensors import assert_bit_equal, tensors
from train_runs import (
    OVERLAPPED,
    command,
    environment,
    losses,
    rank_process,
    run,
    train_command,
    wait_for_step,
)

from moe.checkpoint.manifest import verify
from moe.errors import CorruptCheckpointError


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def copy_before_the_end(run_dir: Path, to: Path) -> Path:
    """The run as it was after its checkpoint at step 10."""
    shutil.copytree(run_dir, to)
    shutil.rmtree(step_folder(to, 20))
    return to


def test_checkpoint_holds_weights_biases_and_moments(reference_run: Path) -> None:
    keys = set(tensors(step_folder(reference_run, 20)))
    expert = "decoder.layers.1.mlp.layer.experts.w_down_eDF"
    assert {expert, "decoder.layers.1.mlp.layer.router.bias_E"} <= keys
    assert {f"optimizer.state.{kind}.{expert}" for kind in ("param", "exp_avg", "exp_avg_sq")} <= keys


def test_resume_in_the_same_layout_is_bit_equal(reference_run: Path, tmp_path: Path) -> None:
    copy = copy_before_the_end(reference_run, tmp_path / "run")
    output = run(command("resume", str(copy)))
    assert "at step 10" in output
    assert "another kind of device" not in " ".join(output.split())
    assert losses(copy) == losses(reference_run)
    assert_bit_equal(step_folder(copy, 20), step_folder(reference_run, 20))


@pytest.mark.parametrize(
    ("nproc", "overrides"),
    [
        (2, ["parallel.tp=2"]),
        pytest.param(4, ["parallel.pp=2", "parallel.ep=2"], marks=pytest.mark.slow),
    ],
    ids=["to tp2", "to pp2 ep2"],
)
def test_resume_in_another_layout_goes_on_with_the_same_losses(
    nproc: int, overrides: list[str], reference_run: Path, tmp_path: Path
) -> None:
    copy = copy_before_the_end(reference_run, tmp_path / "run")
    output = run(command("resume", str(copy), *overrides, "--nproc", str(nproc)))
    assert "in another layout" in output
    assert losses(copy)[10] == pytest.approx(losses(reference_run)[10], rel=1e-6)
    assert losses(copy) == pytest.approx(losses(reference_run), rel=1e-3)


def test_resume_under_another_tokenizer_is_refused_and_writes_nothing(
    reference_run: Path, tmp_path: Path
) -> None:
    copy = copy_before_the_end(reference_run, tmp_path / "run")
    (start,) = [json.loads(line) for line in (copy / "starts.jsonl").read_text().splitlines()]
    (copy / "starts.jsonl").write_text(json.dumps(start | {"tokenizer": "0" * 64}) + "\n")
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    output = " ".join(run(command("resume", str(copy)), expect=2).split())
    assert f"trained with the tokenizer 000000000000, this one is {start['tokenizer'][:12]}" in output
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before


def test_killed_rank_is_named_and_resume_is_bit_equal(overlapped_run: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    argv = train_command(killed, *OVERLAPPED, nproc=2)
    process = subprocess.Popen(
        argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(killed, 12, process)
    survivor = rank_process(process.pid, 0)
    rank_process(process.pid, 1).kill()
    killed_s = time.monotonic()
    survivor.wait(timeout=10)
    output, _ = process.communicate(timeout=10)
    assert time.monotonic() - killed_s <= 10
    assert process.returncode == 4
    assert "rank 1 " in output
    assert signal.SIGKILL.name in output

    run(command("resume", str(killed)))
    assert losses(killed) == losses(overlapped_run)
    assert_bit_equal(step_folder(killed, 20), step_folder(overlapped_run, 20))


def flip_one_bit(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def test_flipped_bit_in_any_file_is_refused_by_name(reference_run: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_00000020"
    shutil.copytree(step_folder(reference_run, 20), checkpoint)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert {".metadata", "common.pt", "manifest.json"} <= {path.name for path in files}
    generator = random.Random(7)
    for trial in range(50):
        path = files[trial % len(files)]
        intact = path.read_bytes()
        flip_one_bit(path, generator)
        with pytest.raises(CorruptCheckpointError, match=rf"['/]{re.escape(path.name)}[' ]"):
            verify(checkpoint)
        path.write_bytes(intact)
    verify(checkpoint)


def test_resume_falls_back_past_a_damaged_checkpoint(reference_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(reference_run, copy)
    flip_one_bit(step_folder(copy, 20) / "__0_0.distcp", random.Random(1))
    output = run(command("resume", str(copy)))
    assert "__0_0.distcp" in output
    assert "at step 10" in output
    assert_bit_equal(step_folder(copy, 20), step_folder(reference_run, 20))
    run(command("verify", str(step_folder(copy, 20))))


def test_finished_run_stays_as_it_is_and_a_plain_resume_follows_the_last_start(
    reference_run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(reference_run, copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    assert "has done its 20 steps" in run(command("resume", str(copy)))
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before

    run(command("resume", str(copy), "train.steps=21", "parallel.ep=2", "--nproc", "2"))
    first = json.loads((copy / "report.json").read_text())
    run(command("resume", str(copy), "train.steps=22"))
    second = json.loads((copy / "report.json").read_text())
    assert second["layout"] == {"tp": 1, "pp": 1, "ep": 2, "cp": 1, "dp": 2, "etp": 1}
    assert second["wall_s"] > first["wall_s"] > json.loads(before["report.json"])["wall_s"]
    assert second["energy"]["total_j"] > first["energy"]["total_j"]
