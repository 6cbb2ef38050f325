"""Whether the memory of a host suffices to save a checkpoint."""

from __future__ import annotations

import os

from moe.launch.doctor.check import Check


def check_save_memory(rank_bytes: float, ranks: int, total_bytes: int | None = None) -> Check:
    """Every rank gathers the optimizer state of all that it holds in the memory of its host, to save it.

    Args:
        rank_bytes: Of one rank.
        ranks: Of this host.
        total_bytes: Its memory; None asks the system.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if total_bytes is None else total_bytes
    needed = rank_bytes * ranks
    text = f"about {needed / 1e9:,.1f} GB to save from {ranks} rank(s), of {total / 1e9:,.1f} GB"
    if needed > total:
        remedy = "share the model out over more ranks: parallel.pp, parallel.ep or parallel.tp"
        return Check("host memory", "fail", text, remedy)
    return Check("host memory", "ok", text)
