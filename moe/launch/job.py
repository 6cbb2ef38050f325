"""One job, whoever schedules it: its config, folder and size, and the command of every node."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe.config.load import dump_config
from moe.launch.environment import Setting
from moe.launch.settings import LaunchConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be launched.

    Attributes:
        config: The run and its launch settings.
        run_dir: Absolute; on storage that all nodes see.
        nodes: Number of nodes.
        gpus_per_node: Ranks of each.
        environment: Of every rank.
    """

    config: LaunchConfig
    run_dir: Path
    nodes: int
    gpus_per_node: int
    environment: Sequence[Setting]

    @property
    def folder(self) -> Path:
        """Where the files of the launch are kept."""
        return self.run_dir / "launch"

    @property
    def config_file(self) -> Path:
        """The resolved config: what was submitted is what runs, whatever happens to the recipe."""
        return self.folder / "config.yaml"

    @property
    def config_text(self) -> str:
        """Content of that file."""
        return dump_config(self.config.run_config())

    @property
    def python(self) -> str:
        """Interpreter on the nodes."""
        return str(self.config.launch.python or sys.executable)

    def train_argv(self, config_file: str) -> list[str]:
        """Arguments of `moe` for a rank; started again, it goes on."""
        return ["train", config_file, f"--run-dir={self.run_dir}", "--auto-resume"]

    def node_argv(self, config_file: str) -> list[str]:
        """Arguments of `moe` for a node, less the address where nodes meet and the job's id."""
        launch = self.config.launch
        return [
            "node",
            config_file,
            f"--run-dir={self.run_dir}",
            f"--nodes={self.nodes}",
            f"--gpus-per-node={self.gpus_per_node}",
            f"--max-restarts={launch.max_restarts}",
            *(["--preflight", f"--grace-s={launch.grace_s}"] if launch.preflight else []),
        ]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A job in the words of its scheduler.

    Attributes:
        text: What a person or another tool would submit.
        files: What has to be written before.
        submit: The command that submits, without a shell.
        environment: Added to that command's environment.
    """

    text: str
    files: Mapping[Path, str]
    submit: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
