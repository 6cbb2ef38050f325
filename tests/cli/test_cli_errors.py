"""Every refusal is one message and its documented exit code, before anything starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from train_runs import REPOSITORY, command, environment

from moe.checkpoint.manifest import commit_manifest, hash_files

QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")

# Runs the command and says on stderr when it starts a process or listens to the network.
WATCHED = """
import sys

STARTS = {"subprocess.Popen", "os.fork", "os.posix_spawn", "os.exec", "os.system", "socket.bind"}

def watch(event, args):
    if event in STARTS:
        print("STARTED", event, file=sys.__stderr__)

sys.addaudithook(watch)
from moe.cli import main
main()
"""


def _moe(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment() | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def _watched(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def _refused(folder: Path, code: int, *arguments: str, **variables: str) -> str:
    """The message of a command that must end with the code, say one thing, and write nothing."""
    before = sorted(folder.rglob("*"))
    done = _moe(folder, *arguments, **variables)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert done.stderr.lower().count("error:") == 1
    assert sorted(folder.rglob("*")) == before
    return done.stderr


# ---- train ------------------------------------------------------------------------------------------------

THREE_MISTAKES = {
    "optim.lrate=3e-4": "unknown key optim.lrate; did you mean optim.lr?",
    "train.steps=many": 'train.steps="many": input should be a valid integer',
    "model.top_k=17": "model.top_k=17 is more than model.num_experts=16; lower model.top_k",
}


def test_three_mistakes_are_all_listed_within_two_seconds_and_nothing_starts(tmp_path):
    before = os.times()
    done = _watched(tmp_path, WATCHED, "train", QUICKSTART, *THREE_MISTAKES, "--nproc", "2")
    after = os.times()
    assert done.returncode == 2
    assert "error: 3 problems in the config, nothing was started:" in done.stderr
    for override, message in THREE_MISTAKES.items():
        assert f"override '{override}': {message}" in done.stderr
    assert "STARTED" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    assert cpu_s <= 2.0


def test_the_watch_sees_a_started_process(tmp_path):
    script = WATCHED.replace("from moe.cli import main", "import subprocess").replace(
        "main()", "subprocess.run(['true'])"
    )
    assert "STARTED subprocess.Popen" in _watched(tmp_path, script).stderr


def test_folder_that_holds_a_run_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "metrics.jsonl").write_text('{"step": 1}\n')
    message = _refused(tmp_path, 2, "train", QUICKSTART, "--run-dir", "stopped")
    assert "stopped holds a run that ended before its first checkpoint" in message
    checkpoint = tmp_path / "taken" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    message = _refused(tmp_path, 2, "train", QUICKSTART, "--run-dir", "taken")
    assert "taken already holds a run" in message
    assert "moe resume taken" in message
    done = _watched(tmp_path, WATCHED, "train", QUICKSTART, "--run-dir", "taken", "--nproc", "2")
    assert done.returncode == 2
    assert "STARTED" not in done.stderr


def test_missing_config_is_refused(tmp_path):
    assert "none.yaml: no such config file" in _refused(tmp_path, 2, "train", "none.yaml")


@pytest.mark.parametrize("world_size", [None, "", "two", "0"])
def test_rank_without_a_world_is_refused(tmp_path, world_size):
    variables = {"RANK": "0"} if world_size is None else {"RANK": "0", "WORLD_SIZE": world_size}
    message = _refused(tmp_path, 2, "train", QUICKSTART, **variables)
    assert "RANK is set" in message
    assert "torchrun" in message


# ---- resume and plot --------------------------------------------------------------------------------------


def test_resume_of_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "does not exist" in _refused(tmp_path, 2, "resume", "missing")
    assert "empty holds no run: config.yaml is missing" in _refused(tmp_path, 2, "resume", "empty")
    assert "holds no run" in _refused(tmp_path, 2, "resume", "empty", "--nproc", "2")


def test_resume_of_a_run_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(Path(QUICKSTART).read_text())
    assert "no complete checkpoint to resume from" in _refused(tmp_path, 2, "resume", "run", "--nproc", "2")


def test_plot_without_metrics_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    assert "metrics.jsonl" in _refused(tmp_path, 2, "plot", "run")
    assert "does not exist" in _refused(tmp_path, 2, "plot", "missing")


# ---- verify -----------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step_00000007"
    folder.mkdir()
    names = ["__0_0.distcp", "common.pt"]
    for name in names:
        (folder / name).write_bytes(name.encode() * 1000)
    commit_manifest(folder, step=7, entries=hash_files(folder, names), state={"world_size": 1})
    return folder


def test_intact_checkpoint_is_verified(tmp_path, checkpoint):
    done = _moe(tmp_path, "verify", checkpoint.name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "step_00000007: step 7, 2 files, 21,000 bytes, intact\n"
    facts = json.loads(_moe(tmp_path, "verify", checkpoint.name, "--json").stdout)
    assert facts == {"step": 7, "files": 2, "bytes": 21_000, "intact": True}


def test_one_flipped_bit_is_named(tmp_path, checkpoint):
    shard = checkpoint / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[1234] ^= 0x10
    shard.write_bytes(content)
    message = _refused(tmp_path, 3, "verify", checkpoint.name)
    assert "__0_0.distcp" in message
    assert "common.pt" not in message


def test_missing_pieces_are_told_apart(tmp_path, checkpoint):
    assert "'step_9' does not exist" in _refused(tmp_path, 2, "verify", "step_9")
    assert "is a file" in _refused(tmp_path, 2, "verify", f"{checkpoint.name}/common.pt")
    (checkpoint / "manifest.json").unlink()
    assert "manifest.json" in _refused(tmp_path, 3, "verify", checkpoint.name)


# ---- data -------------------------------------------------------------------------------------------------


def test_prepare_writes_what_it_says(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("Zwölf")
    (tmp_path / "text" / "b.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    done = _moe(
        tmp_path,
        *("data", "prepare", "--input", "text/a.txt", "--input", "text/b.jsonl"),
        *("--tokenizer", "bytes", "--json-key", "body", "--out", "out/set"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out/set: 3 documents, 15 tokens, 12 bytes of text\n"
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert written["set.bin"] == 15 * 2  # uint16, an end-of-document id after each document
    assert {"set.bin", "set.idx"} <= written.keys()


def test_prepare_as_json(tmp_path):
    (tmp_path / "a.txt").write_text("Zwölf")
    arguments = ("--input", "a.txt", "--tokenizer", "bytes", "--out", "set", "--json")
    facts = json.loads(_moe(tmp_path, "data", "prepare", *arguments).stdout)
    assert (facts["documents"], facts["tokens"], facts["bytes"]) == (1, 7, 6)


def test_prepare_names_file_and_offset_of_bad_utf8(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good\n" * 3 + b"caf\xe9\n")
    arguments = ("--input", "bad.txt", "--tokenizer", "bytes", "--out", "out")
    message = _refused(tmp_path, 3, "data", "prepare", *arguments)
    assert "bad.txt" in message
    assert "18" in message  # 15 bytes of good lines, then "caf"


def test_prepare_of_nothing_is_refused(tmp_path):
    arguments = ("--tokenizer", "bytes", "--out", "out")
    assert "none.txt" in _refused(tmp_path, 2, "data", "prepare", "--input", "none.txt", *arguments)
    assert "--input" in _refused(tmp_path, 2, "data", "prepare", *arguments)


def test_unknown_corpus_is_refused(tmp_path):
    assert "allowed: handbook" in _refused(tmp_path, 2, "data", "fetch", "everything", "--out", "out")


# ---- spelling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["verfy", "x"], "Did you mean 'verify'?"),
        (["trian"], "Did you mean 'train'?"),
        (["data", "prepar"], "Did you mean 'prepare'?"),
        (["train", QUICKSTART, "--nprok", "2"], "--nproc"),
        (["train", QUICKSTART, "--nproc", "0"], "--nproc"),
        (["train", QUICKSTART, "--nproc", "two"], "--nproc"),
        (["train"], "config"),
        (["train", QUICKSTART, "--run_dir", "x"], "--run-dir"),
    ],
    ids=str,
)
def test_slip_of_the_keyboard_gets_a_hint(tmp_path, arguments, hint):
    message = _refused(tmp_path, 2, *arguments)
    assert hint in message
    assert "--help" in message
