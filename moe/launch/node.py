"""`moe node`: what a launched job runs on each of its nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe.errors import InputError, RunStoppedError
from moe.launch.agent import NodeJob, run_node
from moe.launch.local import newest_step, share_cores

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class NodeRequest:
    """What the command line gives a node.

    Attributes:
        config: The run's config, as this node sees it.
        overrides: Of the config.
        run_dir: Folder of the run, on storage that all nodes see.
        nodes: Nodes of the job.
        gpus_per_node: Ranks of each.
        endpoint: host:port of one of the nodes; the port after it is used as well.
        job_id: The same on all nodes, another one for each start of the job.
        max_restarts: Restarts in a row without a new checkpoint.
        preflight: Whether `moe doctor` has to pass first.
        grace_s: From a scheduler's signal to the end, for doctor.
        address: What the other nodes call this one; None asks the system.
    """

    config: Path
    overrides: Sequence[str]
    run_dir: Path
    nodes: int
    gpus_per_node: int
    endpoint: str
    job_id: str
    max_restarts: int
    preflight: bool
    grace_s: int
    address: str | None


def start_node(request: NodeRequest, note: Note) -> None:
    """Check the node where asked, then train until the job ends.

    Raises:
        InputError: the endpoint is no host:port.
        RunStoppedError: a stop was requested.
        MoeError: see moe.launch.agent.run_node.
    """
    host, _, port = request.endpoint.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--endpoint {request.endpoint!r} is no host:port, for example node0:29500")
    share_cores(request.gpus_per_node)
    options = [str(request.config), *request.overrides, f"--run-dir={request.run_dir}"]

    def job(arguments: Sequence[str], name: str, port: int, max_restarts: int) -> NodeJob:
        return NodeJob(
            arguments=arguments,
            nodes=request.nodes,
            ranks=request.gpus_per_node,
            endpoint=f"{host}:{port}",
            job_id=name,
            max_restarts=max_restarts,
            newest_step=lambda: newest_step(request.run_dir),
            local_address=request.address,
            is_host=None if request.address is None else request.address == host,
        )

    if request.preflight:
        examine = ["doctor", *options, f"--grace-s={request.grace_s}"]
        if run_node(job(examine, f"{request.job_id}-doctor", int(port) + 1, 0), note):
            raise RunStoppedError("stopped on request before training; start the job again to go on")
    train = ["train", *options, "--auto-resume"]
    run_node(job(train, request.job_id, int(port), request.max_restarts), note)
