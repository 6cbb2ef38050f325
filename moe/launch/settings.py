"""What a launch is told beside a run's config: the section `launch`, from a cluster file and overrides.

A cluster file holds the section's content and stays the same from run to run;
`launch.KEY=VALUE` overrides it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from moe.config.load import load_as
from moe.config.schema import Count, CountOrZero, RunConfig, Section
from moe.config.tree import ConfigTree

# What an #SBATCH line, a host list or an interface may hold: nothing that any reader takes for syntax.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:,+-]*$", max_length=250)]
# RFC 1123, as Kubernetes names its objects.
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Resource = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=250)]
MountPath = Annotated[str, Field(pattern=r"^/")]


class SlurmSection(Section):
    """What sbatch and srun are given."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time_limit: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")] | None = None  # D-HH:MM:SS
    srun: tuple[str, ...] = ()  # more arguments of srun, one word each, e.g. --container-image=IMAGE


class KubernetesSection(Section):
    """What the TrainJob is given. Kubeflow Trainer 2.2 or newer, which has runtimePatches."""

    namespace: Label = "default"
    runtime: Resource = "torch-distributed"  # a ClusterTrainingRuntime
    image: str | None = None
    claims: dict[Label, MountPath] = Field(default={})  # PersistentVolumeClaims and where they are mounted
    gpu_resource: Resource = "nvidia.com/gpu"
    resources: dict[Resource, Count] = Field(
        default={}
    )  # more of a node's resources, for example RDMA devices


class DeepSpeedSection(Section):
    """What DeepSpeed's launcher is given."""

    hosts: tuple[Word, ...] = ()


class LaunchSection(Section):
    """How a job is started and kept running."""

    gpu: Literal["h100", "h200", "b200", "b300", "gb200", "gb300"] = "h100"
    grace_s: Annotated[int, Field(ge=1, le=65_535)] = 600  # from the signal to the end; Slurm's upper bound
    max_restarts: CountOrZero = 3  # in a row without a new checkpoint; a fourth equal failure is no accident
    preflight: bool = True  # moe doctor on all ranks before training
    port: Annotated[int, Field(ge=1024, lt=65_535)] = 29_500  # torch's usual one; the next is used as well
    interface: Word | None = None  # of the network that all nodes share, for example bond0
    python: Path | None = None  # interpreter on the nodes; by default this one, in a container `python3`
    env: dict[str, str] = Field(default={})  # more environment of the ranks; see environment.py
    slurm: SlurmSection = SlurmSection()
    kubernetes: KubernetesSection = KubernetesSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()


class LaunchConfig(RunConfig):
    """A run and how it is launched."""

    launch: LaunchSection = LaunchSection()

    def run_config(self) -> RunConfig:
        """The run alone, as `moe train` reads it."""
        return RunConfig(**{name: getattr(self, name) for name in RunConfig.model_fields})


def load_launch(
    path: Path, overrides: Sequence[str], *, cluster: Path | None, world_size: int
) -> LaunchConfig:
    """Read a recipe with a cluster file and overrides.

    Raises:
        InputError: a file cannot be read, or a value in it cannot be used; the text names every problem.
    """
    site = [] if cluster is None else [*_as_overrides("launch", ConfigTree(cluster).values)]
    return load_as(LaunchConfig, path, [*site, *overrides], world_size=world_size)


def _as_overrides(key: str, value: Any) -> Iterator[str]:
    """A tree as overrides of its leaves; JSON is YAML."""
    if isinstance(value, dict) and value and all(str(name).isidentifier() for name in value):
        for name, inner in value.items():
            yield from _as_overrides(f"{key}.{name}", inner)
    else:
        yield f"{key}={json.dumps(value)}"
