"""`moe launch`: what it prints, submits, passes on and refuses; schedulers are stand-ins on PATH."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launches import HOSTILE, RECIPE, job
from train_runs import command, environment

from moe.config import load_config
from moe.errors import InputError
from moe.launch.environment import job_environment, own_settings
from moe.launch.hostfile import deepspeed_launch

RECORDER = f"""#!{sys.executable}
import json, os, sys
print("job 7")
seen = {{"argv": sys.argv[1:], "DS_ENV_FILE": os.environ.get("DS_ENV_FILE")}}
json.dump(seen, open(os.environ["SEEN"], "w"))
sys.exit(int(os.environ.get("REFUSE", "0")))
"""
TARGETS = {
    "slurm": ("sbatch", [], {"job.sbatch", "config.yaml"}),
    "kubernetes": ("kubectl", ["launch.kubernetes.image=r/moe"], {"trainjob.yaml"}),
    "deepspeed": (
        "deepspeed",
        ["launch.deepspeed.hosts=[node0, node1]"],
        {"hostfile", "deepspeed_env", "config.yaml"},
    ),
}
TWO_NODES = ("--nodes", "2", "--gpus-per-node", "1", "train.micro_batch_size=1")


def moe(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("launch", str(RECIPE), *arguments),
        env=environment() | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def path_with(tmp_path: Path):
    def add(program: str) -> str:
        file = tmp_path / "bin" / program
        file.parent.mkdir(exist_ok=True)
        file.write_text(RECORDER)
        file.chmod(0o755)
        return f"{file.parent}:{os.environ['PATH']}"

    return add


@pytest.mark.parametrize("on", TARGETS)
def test_dry_run_prints_and_writes_nothing_and_submit_writes_what_it_printed(on, tmp_path, path_with):
    program, settings, files = TARGETS[on]
    run_dir = tmp_path / "run"
    arguments = (*TWO_NODES, *settings, "--on", on, "--run-dir", str(run_dir))
    dry = moe(*arguments)
    assert dry.returncode == 0, dry.stderr
    assert "axis  size  groups" in dry.stderr
    assert f"would run {program} " in dry.stderr
    assert not run_dir.exists()

    seen = tmp_path / "seen.json"
    done = moe(*arguments, "--submit", PATH=path_with(program), SEEN=str(seen))
    assert (done.returncode, done.stdout) == (0, "job 7\n"), done.stderr
    written = {path.name: path.read_text() for path in (run_dir / "launch").iterdir()}
    assert written.keys() == files
    assert dry.stdout in written.values()
    told = json.loads(seen.read_text())
    assert any(str(run_dir / "launch") in word for word in told["argv"])
    if on == "deepspeed":
        assert written["hostfile"] == "node0 slots=1\nnode1 slots=1\n"
        assert told["DS_ENV_FILE"] == str(run_dir / "launch" / "deepspeed_env")
        at = told["argv"].index("--module")
        assert told["argv"][at + 1 : at + 3] == ["moe", "train"]


def test_refusal_of_the_scheduler_is_an_error(tmp_path, path_with):
    arguments = (*TWO_NODES, "--on", "slurm", "--run-dir", str(tmp_path / "run"), "--submit")
    done = moe(*arguments, PATH=path_with("sbatch"), SEEN=str(tmp_path / "seen"), REFUSE="3")
    assert done.returncode == 1
    assert "sbatch ended with exit code 3" in done.stderr


def test_missing_scheduler_is_refused_before_anything_is_written(tmp_path):
    arguments = (*TWO_NODES, "--on", "slurm", "--run-dir", str(tmp_path / "run"), "--submit")
    done = moe(*arguments, PATH=str(tmp_path))
    assert done.returncode == 2
    assert "sbatch is not on PATH" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on", "cloud"], "allowed: local, slurm, kubernetes, deepspeed"),
        (["--on", "local", "--nodes", "2"], "--on local is one node"),
        (["--gpus-per-node", "3"], "train.global_batch_size"),
        (["--gpus-per-node", "2", "launch.partition=x"], "unknown key launch.partition"),
        (["--gpus-per-node", "2", "launch.env={RANK: '1'}"], "RANK is set by the launcher"),
        (["--gpus-per-node", "2", "launch.env={HF_TOKEN: x}"], "HF_TOKEN looks like a secret"),
        (["--gpus-per-node", "2", "launch.env={'A B': x}"], "no name of an environment variable"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_launched_is_refused(arguments, message):
    done = moe(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_cluster_file_is_the_launch_section_and_overrides_win(tmp_path):
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump({"grace_s": 90, "slurm": {"partition": "gpu", "account": "a"}}))
    override = "launch.slurm.account=b"
    done = moe("--on", "slurm", "--gpus-per-node", "2", override, "--cluster", str(cluster))
    assert done.returncode == 0, done.stderr
    for line in ("#SBATCH --partition=gpu", "#SBATCH --account=b", "#SBATCH --signal=B:USR1@90"):
        assert line in done.stdout.splitlines()


def test_environment_is_an_allow_list_and_every_setting_has_its_reason():
    shell = {
        "NCCL_IB_HCA": "mlx5",
        "NCCL_DEBUG": "INFO",
        "WANDB_API_KEY": "secret",
        "PATH": "/bin",
        "NCCL_X;id": "1",
    }
    config = job("launch.env={NCCL_DEBUG: TRACE}", on="slurm").config
    settings = {setting.name: setting for setting in job_environment(config, shell)}
    assert settings["NCCL_IB_HCA"].value == "mlx5"
    assert settings["NCCL_DEBUG"].value == "TRACE"  # ours, then the shell's, then launch.env's
    assert settings.keys().isdisjoint({"WANDB_API_KEY", "PATH", "NCCL_X;id"})
    assert all(setting.reason.endswith((".", ").")) for setting in own_settings(config))


@pytest.mark.parametrize(
    ("shell", "launch_env", "expected"),
    [
        ({}, {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "a:1"}, {}, {"PYTORCH_ALLOC_CONF": "a:1"}),
        ({}, {"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_ALLOC_CONF": "a:1"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "b:1"}, {}, {"PYTORCH_CUDA_ALLOC_CONF": "b:1"}),
    ],
)
def test_our_allocator_setting_gives_way_under_either_name(shell, launch_env, expected):
    config = job(f"launch.env={json.dumps(launch_env)}", on="slurm").config
    settings = {setting.name: setting.value for setting in job_environment(config, shell)}
    assert {name: value for name, value in settings.items() if "ALLOC_CONF" in name} == expected


@pytest.mark.parametrize("value", [value for value in HOSTILE if value not in ("-rf", "%j")], ids=repr)
def test_deepspeed_is_not_given_what_a_remote_shell_could_run(value, tmp_path):
    hosts = "launch.deepspeed.hosts=[node0]"
    with pytest.raises(InputError, match="unquoted to remote shells"):
        deepspeed_launch(job(hosts, on="deepspeed", run_dir=tmp_path / value))
    with pytest.raises(InputError, match="unquoted to remote shells"):
        deepspeed_launch(job(hosts, f"launch.env={json.dumps({'X': value})}", on="deepspeed"))


@pytest.mark.parametrize("host", HOSTILE, ids=repr)
def test_hostile_host_is_refused(host, tmp_path):
    with pytest.raises(InputError, match=r"launch\.deepspeed\.hosts"):
        job(f"launch.deepspeed.hosts={json.dumps([host])}", on="deepspeed")


def test_too_few_hosts_are_refused():
    made = job("launch.deepspeed.hosts=[node0]", on="deepspeed", nodes=2)
    with pytest.raises(InputError, match="names 1 host"):
        deepspeed_launch(made)


def test_submitted_config_is_the_resolved_one():
    made = job("optim.lr=5e-4", on="slurm", nodes=2)
    assert "launch" not in yaml.safe_load(made.config_text)
    assert load_config(RECIPE, ["optim.lr=5e-4"]).optim == made.config.optim
