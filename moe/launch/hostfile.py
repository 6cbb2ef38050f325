"""A job for DeepSpeed's own launcher: a hostfile, an environment file and one command.

That launcher starts ranks over pdsh without quoting what it sends to the remote shells (DeepSpeed 0.19,
launcher/multinode_runner.py), so values that a shell could take for syntax are refused here. It has no
restart of lost ranks and passes no signal on: a job that needs either goes through Slurm or Kubernetes.
"""

from __future__ import annotations

import re

from moe.errors import InputError
from moe.launch.job import Job, Launch

_PLAIN = re.compile(r"[\w@%+=:,./-]+")  # what DeepSpeed itself leaves unquoted


def deepspeed_launch(job: Job) -> Launch:
    """The hostfile and the command.

    Raises:
        InputError: there are fewer hosts than nodes, or a value cannot be passed safely.
    """
    hosts = job.config.launch.deepspeed.hosts
    if len(hosts) < job.nodes:
        raise InputError(
            f"launch.deepspeed.hosts names {len(hosts)} host(s) for {job.nodes} node(s); "
            "add hosts, for example 'launch.deepspeed.hosts=[node0, node1]', or lower --nodes"
        )
    hostfile, env_file = job.folder / "hostfile", job.folder / "deepspeed_env"
    text = "".join(f"{host} slots={job.gpus_per_node}\n" for host in hosts[: job.nodes])
    values = [(setting.name, setting.value) for setting in job.environment]
    command = [
        "deepspeed",
        f"--hostfile={hostfile}",
        f"--num_nodes={job.nodes}",
        f"--num_gpus={job.gpus_per_node}",
        f"--master_port={job.config.launch.port}",
        "--no_local_rank",
        "--module",
        "moe",
        *job.train_argv(str(job.config_file)),
    ]
    for word in [*command, *(value for _, value in values)]:
        if not _PLAIN.fullmatch(word):
            raise InputError(
                f"DeepSpeed's launcher would hand {word!r} unquoted to remote shells; use letters, digits "
                "and @%+=:,./-_ in paths and environment values, or launch with Slurm or Kubernetes"
            )
    return Launch(
        text=text,
        files={
            hostfile: text,
            env_file: "".join(f"{name}={value}\n" for name, value in values),
            job.config_file: job.config_text,
        },
        submit=command,
        environment={"DS_ENV_FILE": str(env_file)},
    )
