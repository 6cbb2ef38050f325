"""How long ranks exchange data: bytes over links plus latency.

Bytes are those that one rank sends. A link sustains the share of its peak that hardware.py gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe.planner.hardware import Gpu
from moe.planner.layout import Layout, neighbours

# To start a collective and to cross the fabric once more for each doubling of the group (NCCL's trees).
# NCCL on NVLink: 20-30 us for small messages (SimuMax v1.2, B200); a hop over the NIC costs about 5 us.
START_S = 15e-6
HOP_S = 5e-6


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that exchange data.

    Attributes:
        size: Ranks.
        near: Ranks of it in one NVLink domain, 1 if none shares a domain.
    """

    size: int
    near: int

    @property
    def domains(self) -> int:
        """NVLink domains that it spans."""
        return -(-self.size // self.near)


def tensor_group(layout: Layout, gpu: Gpu) -> Group:
    """Tensor parallelism: neighbouring ranks."""
    return _group(layout.tp, 1, gpu)


def context_group(layout: Layout, gpu: Gpu) -> Group:
    """Context parallelism."""
    return _group(layout.cp, layout.tp, gpu)


def dense_group(layout: Layout, gpu: Gpu) -> Group:
    """Ranks with the same dense weights."""
    return _group(layout.dense_replicas, layout.tp, gpu)


def expert_group(layout: Layout, gpu: Gpu) -> Group:
    """Ranks that share out the experts."""
    return _group(layout.ep, layout.etp, gpu)


def expert_tensor_group(layout: Layout, gpu: Gpu) -> Group:
    """Ranks that split each expert."""
    return _group(layout.etp, 1, gpu)


def expert_data_group(layout: Layout, gpu: Gpu) -> Group:
    """Ranks with the same experts."""
    return _group(layout.edp, layout.expert_ranks, gpu)


def gather_s(bytes_total: float, group: Group, gpu: Gpu) -> float:
    """All-gather to, or reduce-scatter of, `bytes_total` on each rank.

    A ring sends (n - 1) / n of it. Between domains, its members in a domain send through their own NICs side
    by side, so a domain with more of them is faster, up to NVLink's speed.
    """
    if group.size == 1:
        return 0.0
    nvlink = gpu.nvlink_bytes_per_s * gpu.efficiency.nvlink
    nic = gpu.nic_bytes_per_s * gpu.efficiency.nic
    rate = nvlink if group.domains == 1 else min(nvlink, group.near * nic)
    return bytes_total * (group.size - 1) / group.size / rate + latency_s(group)


def latency_s(group: Group) -> float:
    """Time of a collective of few bytes."""
    return START_S + HOP_S * math.log2(group.size)


def send_s(bytes_sent: float, gpu: Gpu, *, near: bool) -> float:
    """One rank to another."""
    rate = (
        gpu.nvlink_bytes_per_s * gpu.efficiency.nvlink if near else gpu.nic_bytes_per_s * gpu.efficiency.nic
    )
    return bytes_sent / rate + HOP_S


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Rows of the experts' all-to-all.

    Attributes:
        tokens: Tokens of the sending rank.
        top_k: Experts of a token.
        row_bytes: Of one token.
        dedup: A token crosses to a domain, and on to a rank there, once, however many of its experts live
            there.
        max_domains: Domains that a token may reach (node-limited routing, arXiv 2412.19437).
    """

    tokens: float
    top_k: int
    row_bytes: float
    dedup: bool
    max_domains: int


def expected_distinct(choices: int, places: int) -> float:
    """Different places that random choices hit on average.

    n (1 - (1 - 1/n)^k): the occupancy of n places by k throws.
    """
    return places * (1 - (1 - 1 / places) ** choices)


def exchange_bytes(exchange: Exchange, group: Group) -> tuple[float, float]:
    """(NVLink, NIC) bytes that a rank sends in one dispatch; a combine sends as much."""
    all_rows = exchange.tokens * exchange.row_bytes
    n, domains = group.size, group.domains
    if not exchange.dedup:
        rows = all_rows * exchange.top_k
        return rows * (group.near - 1) / n, rows * (n - group.near) / n
    reached = expected_distinct(exchange.top_k, min(domains, exchange.max_domains))
    nic = all_rows * reached * (domains - 1) / domains
    # What arrives in a domain is handed on there, once to each rank that it concerns.
    ranks = reached * expected_distinct(round(exchange.top_k / reached), group.near)
    return all_rows * ranks * (group.near - 1) / group.near, nic


def exchange_s(exchange: Exchange, group: Group, gpu: Gpu) -> float:
    """One dispatch or one combine; both links work at once."""
    if group.size == 1:
        return 0.0
    nvlink, nic = exchange_bytes(exchange, group)
    efficiency = gpu.efficiency
    near_s = nvlink / (gpu.nvlink_bytes_per_s * efficiency.nvlink)
    far_s = nic / (gpu.nic_bytes_per_s * efficiency.nic)
    return max(near_s, far_s) + latency_s(group)


def _group(size: int, stride: int, gpu: Gpu) -> Group:
    return Group(size=size, near=neighbours(size, stride, gpu.nvlink_domain))
