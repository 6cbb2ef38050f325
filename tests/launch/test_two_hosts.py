"""Two hosts for real: network namespaces that only a cable joins, each with a process tree of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from checkpoint_tensors import assert_bit_equal
from launches import OVERRIDES, Start, end, job, last
from train_runs import TINY, command, losses, wait_for_step

from moe.durable import write_atomically

HOSTS = {"10.77.0.1": ("moe1", "moeveth1"), "10.77.0.2": ("moe2", "moeveth2")}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    (one, cable_one), (two, cable_two) = HOSTS.values()
    try:
        ip("netns", "add", one)
        ip("netns", "add", two)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.strip()}")
    ip("link", "add", cable_one, "netns", one, "type", "veth", "peer", "name", cable_two, "netns", two)
    for address, (host, cable) in HOSTS.items():
        ip("-n", host, "addr", "add", f"{address}/24", "dev", cable)
        ip("-n", host, "link", "set", cable, "up")
        ip("-n", host, "link", "set", "lo", "up")
    yield
    for host, _ in HOSTS.values():
        ip("netns", "del", host)


def test_lost_host_is_replaced_and_the_job_goes_on_bit_equal(
    start: Start, hosts: None, clean_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = (*TINY, *OVERRIDES, "checkpoint.interval=4", "launch.preflight=false")
    made = job(*settings, on="slurm", nodes=2, gpus_per_node=1, run_dir=run_dir)
    write_atomically(made.config_file, made.config_text)

    def node(address: str) -> subprocess.Popen[str]:
        """What the sbatch script has srun start on each node; the address is what Slurm knows of it."""
        host, cable = HOSTS[address]
        argv = command(*made.node_argv(str(made.config_file)), "--endpoint=10.77.0.1:29500")
        where = ["ip", "netns", "exec", host]
        return start([*where, *argv, f"--address={address}"], GLOO_SOCKET_IFNAME=cable)

    one, two = map(node, HOSTS)
    wait_for_step(run_dir, 5, one)
    for process in [*psutil.Process(two.pid).children(recursive=True), psutil.Process(two.pid)]:
        process.kill()
    two.wait()
    replacement = node("10.77.0.2")
    assert "resuming from" in end(one, expect=0) + end(replacement, expect=0)
    assert losses(run_dir) == losses(clean_run)
    assert_bit_equal(last(run_dir), last(clean_run))
