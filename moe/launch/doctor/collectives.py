"""Timed and verified collectives over all ranks, and how far their clocks are apart. Collective functions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from moe.launch.doctor.check import Check

MESSAGE_BYTES = {"cuda": 256 * 2**20, "cpu": 8 * 2**20}
WARM_UP, TIMED = 2, 5
CLOCK_ROUNDS = 5
# Logs and Kerberos live with a second; file systems and profilers that compare stamps do not.
CLOCK_WARN_S = 0.5
# Bus bandwidth below which something is broken rather than slow, bytes/s: a node without working NVLink, a
# network that fell back to TCP. Healthy: 300 to 480e9 inside an H100 node, 40e9 for each GPU between nodes.
LEAST_NVLINK, LEAST_NETWORK = 100e9, 8e9


def check_all_reduce(device: torch.device, group: dist.ProcessGroup | None, *, nodes: int) -> Check:
    """All-reduce of one large message: right, and how fast.

    Args:
        device: Where the message lives.
        group: The ranks; None is the default group.
        nodes: Nodes of the job.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    message = torch.empty(MESSAGE_BYTES[device.type] // 4, dtype=torch.float32, device=device)

    def once() -> None:
        message.fill_(rank + 1)
        dist.all_reduce(message, group=group)

    seconds = _median_s(once, device)
    right = bool((message == world * (world + 1) // 2).all())
    bus = message.nbytes / seconds * 2 * (world - 1) / world
    return _verdict("all-reduce", right, bus, device, nodes)


def check_all_to_all(device: torch.device, group: dist.ProcessGroup | None, *, nodes: int) -> Check:
    """All-to-all of one large message: right, and how fast. See check_all_reduce."""
    world, rank = dist.get_world_size(), dist.get_rank()
    each = MESSAGE_BYTES[device.type] // 4 // world
    sent = torch.arange(world, dtype=torch.float32, device=device).repeat_interleave(each) + rank * world
    received = torch.empty_like(sent)

    def once() -> None:
        dist.all_to_all_single(received, sent, group=group)

    seconds = _median_s(once, device)
    expected = torch.arange(world, dtype=torch.float32, device=device).repeat_interleave(each) * world + rank
    bus = sent.nbytes / seconds * (world - 1) / world
    return _verdict("all-to-all", bool(torch.equal(received, expected)), bus, device, nodes)


def _median_s(once: Callable[[], None], device: torch.device) -> float:
    """Median seconds of a collective, of the slowest rank."""
    times_s = []
    for _ in range(WARM_UP + TIMED):
        dist.barrier()
        started_s = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times_s.append(time.perf_counter() - started_s)
    slowest = torch.tensor(statistics.median(times_s[WARM_UP:]), dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def _verdict(name: str, right: bool, bus_bytes_per_s: float, device: torch.device, nodes: int) -> Check:
    """The same on every rank."""
    wrong = torch.tensor([not right], dtype=torch.int32)
    dist.all_reduce(wrong)
    world = dist.get_world_size()
    text = f"{bus_bytes_per_s / 1e9:.2f} GB/s bus bandwidth over {world} rank(s) on {device.type}"
    if int(wrong):
        remedy = "results are corrupted on the way: run again with halves of the nodes to find the one"
        return Check(name, "fail", f"wrong on {int(wrong)} of {world} rank(s), {text}", remedy)
    if world == 1:
        return Check(name, "skipped", "one rank has nobody to talk to", "use --nproc 2 or more")
    least = LEAST_NVLINK if nodes == 1 else LEAST_NETWORK
    if device.type == "cuda" and bus_bytes_per_s < least:
        remedy = "look at the nvlink and infiniband checks; NCCL_DEBUG=INFO shows the path that NCCL takes"
        return Check(name, "warn", f"{text}, expected at least {least / 1e9:.0f}", remedy)
    return Check(name, "ok", text)


def check_clock_skew() -> Check:
    """Spread of the wall clocks of all ranks, read right after a barrier; the best of some rounds."""
    spreads_s = []
    for _ in range(CLOCK_ROUNDS):
        clocks = [torch.zeros((), dtype=torch.float64) for _ in range(dist.get_world_size())]
        dist.barrier()
        dist.all_gather(clocks, torch.tensor(time.time(), dtype=torch.float64))
        spreads_s.append(float(max(clocks) - min(clocks)))
    skew_s = min(spreads_s)
    text = f"at most {skew_s * 1e3:.1f} ms over {dist.get_world_size()} rank(s)"
    if skew_s > CLOCK_WARN_S:
        return Check("clock skew", "warn", text, "have chrony or ntpd looked at on the nodes")
    return Check("clock skew", "ok", text)
