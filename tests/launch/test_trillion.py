"""The recipes of our 1 T model on the GPUs that they are for: valid jobs, laid out as their comments say."""

from __future__ import annotations

from pathlib import Path

import pytest
from launches import RECIPE
from typer.testing import CliRunner

from moe.cli import app

NODES = {"h100": 64, "b200": 32}
IMAGE = "launch.kubernetes.image=registry.example/moe:1"


@pytest.mark.parametrize("on", ["slurm", "kubernetes"])
@pytest.mark.parametrize("gpu", NODES)
def test_dry_run_lays_out_the_trillion(gpu: str, on: str, tmp_path: Path) -> None:
    recipe = RECIPE.with_name(f"sovereign-1t-a32b-{gpu}.yaml")
    argv = ["launch", str(recipe), "--on", on, "--nodes", str(NODES[gpu]), "--gpus-per-node", "8"]
    argv += ["--dry-run", "--run-dir", str(tmp_path / "run"), *([IMAGE] if on == "kubernetes" else [])]
    shown = CliRunner().invoke(app, argv)
    assert shown.exit_code == 0, shown.output
    rows = {line.split()[0]: line for line in shown.output.splitlines() if line[:3].strip() in ("ep", "pp")}
    assert "inside a node" in rows["ep"]  # all experts of a layer on NVLink
    assert rows["pp"].split()[1] == "32"
    assert not (tmp_path / "run").exists()  # a dry run writes nothing
