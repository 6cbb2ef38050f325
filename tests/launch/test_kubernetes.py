"""The TrainJob: every field is one that the API documents, and hostile values stay values.

The schema below is written from the Go types of kubeflow/trainer (pkg/apis/trainer/v1alpha1/trainjob_types.go
at 8c0f5059, of Trainer 2.2 and later) and from Kubernetes' core v1; it lists the fields that we use.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from launches import HOSTILE, RECIPE, job

from moe.config import load_config
from moe.errors import InputError
from moe.launch.kubernetes import kubernetes_launch, object_name, render

IMAGE = "launch.kubernetes.image=registry.example/moe:1"
Schema = Any


def text(pattern: str = r"(?s).+", *, most: int = 1_048_576) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and len(value) <= most and bool(re.fullmatch(pattern, value))


def at_least(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value < 2**31


RFC_1035 = text(r"[a-z]([-a-z0-9]*[a-z0-9])?", most=63)
RFC_1123 = text(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", most=63)
QUANTITY = text(r"[0-9]+(\.[0-9]+)?([KMGTPE]i?|m)?")
ENV = [{"name!": text(r"[A-Za-z_][A-Za-z0-9_]*"), "value": text(r"(?s).*")}]
METADATA = {"name!": RFC_1035, "namespace": RFC_1123, "labels": {"*": text(most=63)}}
VOLUME = {
    "name!": RFC_1123,
    "configMap": {"name!": RFC_1035},
    "emptyDir": {"medium": text("Memory"), "sizeLimit": QUANTITY},
    "persistentVolumeClaim": {"claimName!": RFC_1123},
}
MOUNT = {"name!": RFC_1123, "mountPath!": text(r"[^:]+"), "readOnly": lambda value: isinstance(value, bool)}
POD_PATCH = {
    "terminationGracePeriodSeconds": at_least(0),
    "volumes": [VOLUME],
    # The containers of a runtime that are named node take no environment here, only from spec.trainer.
    "containers": [{"name!": text(), "volumeMounts": [MOUNT]}],
}
JOB_PATCH = {"name!": text(most=253), "template": {"spec": {"template": {"spec": POD_PATCH}}}}
TRAIN_JOB: Schema = {
    "apiVersion!": text(r"trainer\.kubeflow\.org/v1alpha1"),
    "kind!": text("TrainJob"),
    "metadata!": METADATA,
    "spec!": {
        "runtimeRef!": {
            "name!": text(most=253),
            "apiGroup": text(most=253),
            "kind": text("(Cluster)?TrainingRuntime"),
        },
        "trainer": {
            "image": text(most=500),
            "command": [text()],
            "args": [text()],
            "env": ENV,
            "numNodes": at_least(0),
            "numProcPerNode": at_least(1),
            "resourcesPerNode": {"limits": {"*": QUANTITY}, "requests": {"*": QUANTITY}},
        },
        "runtimePatches": [
            {
                "manager!": text(most=253),
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [JOB_PATCH]}}},
            }
        ],
    },
}
CONFIG_MAP: Schema = {
    "apiVersion!": text("v1"),
    "kind!": text("ConfigMap"),
    "metadata!": METADATA,
    "data": {"*": text(r"(?s).*")},
}
# torchrun's own, which Trainer's webhook refuses in spec.trainer.env.
RESERVED = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}


def problems(value: Any, schema: Schema, path: str = "") -> Iterator[str]:
    """Where a value differs from the schema: `key!` is required, `*` any key, a list is of its item."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            yield f"{path}: not an object"
            return
        known = {key.rstrip("!"): inner for key, inner in schema.items()}
        yield from (
            f"{path}.{key[:-1]}: missing" for key in schema if key[-1] == "!" and key[:-1] not in value
        )
        for key, inner in value.items():
            if key not in known and "*" not in known:
                yield f"{path}.{key}: unknown"
            else:
                yield from problems(inner, known.get(key, known.get("*")), f"{path}.{key}")
    elif isinstance(schema, list):
        if not isinstance(value, list) or len(value) > 128:
            yield f"{path}: not a list of at most 128"
            return
        for index, item in enumerate(value):
            yield from problems(item, schema[0], f"{path}[{index}]")
    elif not schema(value):
        yield f"{path}: {value!r}"


def documents(*overrides: str, **arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    config_map, train_job = yaml.safe_load_all(render(job(*overrides, on="kubernetes", **arguments)))
    return config_map, train_job


@pytest.mark.parametrize(("gpu", "nodes"), [("h100", 64), ("b200", 32)])
def test_the_trillion_fits_the_schema(gpu: str, nodes: int) -> None:
    recipe = RECIPE.with_name(f"sovereign-1t-a32b-{gpu}.yaml")
    config_map, train_job = documents(IMAGE, nodes=nodes, config=recipe)
    assert list(problems(train_job, TRAIN_JOB)) == []
    assert list(problems(config_map, CONFIG_MAP)) == []


@pytest.mark.parametrize(("gpu", "nodes"), [("h100", 64), ("b200", 32)])
def test_large_job_fits_the_schema(gpu: str, nodes: int) -> None:
    config_map, train_job = documents(
        IMAGE,
        f"launch.gpu={gpu}",
        "launch.kubernetes.claims={training-data: /data, runs: /runs}",
        "launch.kubernetes.resources={rdma/hca: 8}",
        "parallel={tp: 2, ep: 16, pp: 2}",
        nodes=nodes,
    )
    assert list(problems(train_job, TRAIN_JOB)) == []
    assert list(problems(config_map, CONFIG_MAP)) == []
    trainer = train_job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (nodes, 8)
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "8", "rdma/hca": "8"}
    assert RESERVED.isdisjoint(item["name"] for item in trainer["env"])
    # Pod 0 of the replicated job `node`, through the headless service that JobSet names after the job.
    assert "--endpoint=quickstart-node-0-0.quickstart:29500" in trainer["args"]
    patch = train_job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    pod = patch["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 600
    assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} == {
        "/etc/joulemoe",
        "/dev/shm",
        "/data",
        "/runs",
    }


def test_config_in_the_config_map_is_the_run(tmp_path) -> None:
    config_map, _ = documents(IMAGE, "optim.lr=5e-4")
    (tmp_path / "config.yaml").write_text(config_map["data"]["config.yaml"])
    assert load_config(tmp_path / "config.yaml", world_size=8).optim.lr == 5e-4


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_hostile_values_stay_values(value: str, tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    section = {"launch": {"env": {"X": value}, "kubernetes": {"image": "r/moe"}}}
    recipe.write_text(RECIPE.read_text() + yaml.safe_dump(section))
    run_dir = tmp_path / value
    config_map, train_job = documents(config=recipe, run_dir=run_dir)
    assert list(problems(train_job, TRAIN_JOB)) == []
    assert list(problems(config_map, CONFIG_MAP)) == []
    trainer = train_job["spec"]["trainer"]
    assert {"name": "X", "value": value} in trainer["env"]
    assert f"--run-dir={run_dir}" in trainer["args"]


@pytest.mark.parametrize(
    ("run_name", "expected"),
    [("quickstart", "quickstart"), ("Kimi_K2.1T", "kimi-k2-1t"), ("671b", "run-671b"), ("a-.", "a")],
)
def test_run_name_becomes_an_object_name(run_name: str, expected: str) -> None:
    assert object_name(run_name) == expected
    assert RFC_1035(expected)


def test_what_cannot_be_submitted_is_refused() -> None:
    with pytest.raises(InputError, match=r"launch\.kubernetes\.image is not set"):
        documents()
    with pytest.raises(InputError, match="at most 50"):
        object_name("x" * 51)
    made = job(IMAGE, "launch.kubernetes.claims={data: /data}", on="kubernetes", run_dir=Path("/tmp/run"))
    with pytest.raises(InputError, match="would end with the pod"):
        kubernetes_launch(made)
    made = job(IMAGE, "launch.kubernetes.claims={data: /data}", on="kubernetes", run_dir=Path("/data/run"))
    assert kubernetes_launch(made).submit[:2] == ["kubectl", "create"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "trainer", "numNode"), 2),
        (("spec", "trainer", "numNodes"), "2"),
        (("spec", "podTemplateOverrides"), []),
        (("metadata", "name"), "1a"),
    ],
)
def test_schema_finds_a_planted_mistake(path: tuple[str, ...], value: Any) -> None:
    _, train_job = documents(IMAGE)
    broken = copy.deepcopy(train_job)
    *parents, leaf = path
    target = broken
    for key in parents:
        target = target[key]
    target[leaf] = value
    assert [problem for problem in problems(broken, TRAIN_JOB) if f".{leaf}" in problem]
