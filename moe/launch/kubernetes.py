"""A job as a TrainJob of Kubeflow Trainer 2.2 or newer, with a ConfigMap that holds the run's config.

API: github.com/kubeflow/trainer, pkg/apis/trainer/v1alpha1 (read at 8c0f5059). The runtime named by
launch.kubernetes.runtime must have a replicated job and container `node`, as torch-distributed has, and
restart a container that fails: exit code 5 after an eviction means "start again".
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from moe.errors import InputError
from moe.launch.job import Job, Launch

API_VERSION = "trainer.kubeflow.org/v1alpha1"
MANAGER = "joulemoe"
CONFIG_MOUNT = "/etc/joulemoe"
# JobSet names pods NAME-node-0-INDEX, which must be a host name too: 63 characters.
LONGEST_NAME = 50


def kubernetes_launch(job: Job) -> Launch:
    """The manifest and how it is submitted.

    Raises:
        InputError: the run's name is too long, no image is named, or the run's folder is on no claim.
    """
    _check_run_dir(job)
    manifest = job.folder / "trainjob.yaml"
    text = render(job)
    return Launch(text=text, files={manifest: text}, submit=["kubectl", "create", f"--filename={manifest}"])


def _check_run_dir(job: Job) -> None:
    """Without claims of ours, the runtime may mount storage that we do not know of."""
    mounts = job.config.launch.kubernetes.claims.values()
    if mounts and not any(job.run_dir.is_relative_to(mount) for mount in mounts):
        raise InputError(
            f"--run-dir {job.run_dir} is on none of the claims ({', '.join(mounts)}): its checkpoints "
            "would end with the pod; choose a folder below one of them"
        )


def render(job: Job) -> str:
    """ConfigMap and TrainJob as YAML."""
    name = object_name(job.config.run.name)
    reasons = "".join(f"# {setting.name}: {setting.reason}\n" for setting in job.environment)
    documents = [_config_map(job, name), _train_job(job, name)]
    return f"# Written by `moe launch`.\n{reasons}" + yaml.safe_dump_all(
        documents, sort_keys=False, explicit_start=True
    )


def object_name(run_name: str) -> str:
    """A run's name as the API takes it: RFC 1035, lower case, beginning with a letter.

    Raises:
        InputError: nothing is left of it, or it is too long.
    """
    name = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}"
    if len(name) > LONGEST_NAME:
        raise InputError(
            f"run.name={run_name} gives a Kubernetes name of {len(name)} characters; at most {LONGEST_NAME}"
        )
    return name


def _config_map(job: Job, name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, name),
        "data": {"config.yaml": job.config_text},
    }


def _train_job(job: Job, name: str) -> dict[str, Any]:
    kubernetes = job.config.launch.kubernetes
    if kubernetes.image is None:
        raise InputError(
            "launch.kubernetes.image is not set; name an image that holds this library and its training extra"
        )
    resources = {kubernetes.gpu_resource: job.gpus_per_node, **kubernetes.resources}
    python = str(job.config.launch.python or "python3")
    return {
        "apiVersion": API_VERSION,
        "kind": "TrainJob",
        "metadata": _metadata(job, name),
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime",
                "name": kubernetes.runtime,
            },
            "trainer": {
                "image": kubernetes.image,
                "command": [python, "-m", "moe"],
                "args": [
                    *job.node_argv(f"{CONFIG_MOUNT}/config.yaml"),
                    f"--endpoint={name}-node-0-0.{name}:{job.config.launch.port}",
                    f"--job-id={name}",
                ],
                "env": [{"name": setting.name, "value": setting.value} for setting in job.environment],
                "numNodes": job.nodes,
                "numProcPerNode": job.gpus_per_node,
                # Limits alone: a request of such a resource equals its limit.
                "resourcesPerNode": {"limits": {key: str(value) for key, value in resources.items()}},
            },
            "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": _pod_patch(job, name)}],
        },
    }


def _metadata(job: Job, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": job.config.launch.kubernetes.namespace,
        "labels": {"app.kubernetes.io/managed-by": MANAGER},
    }


def _pod_patch(job: Job, name: str) -> dict[str, Any]:
    """Volumes and grace time of the pods, at their place in the runtime's template."""
    launch = job.config.launch
    # NCCL and data loaders share memory between ranks; a container's default is 64 MiB.
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": name}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "config", "mountPath": CONFIG_MOUNT, "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108 - the pod's own
    ]
    for index, (claim, path) in enumerate(launch.kubernetes.claims.items()):
        volumes.append({"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"claim-{index}", "mountPath": path})
    pod = {
        "terminationGracePeriodSeconds": launch.grace_s,
        "volumes": volumes,
        "containers": [{"name": "node", "volumeMounts": mounts}],
    }
    replicated = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {"template": {"spec": {"replicatedJobs": [replicated]}}}
