"""Whether checkpoints fit the disk, and into the time that a stop leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path

from moe.durable import free_bytes
from moe.errors import InputError
from moe.launch.doctor.check import Check

WRITE_BYTES = 64 * 2**20  # enough to leave the cache of a network client; fsync does the rest


def check_space(folder: Path, needed_bytes: int, keep: int) -> Check:
    """Whether the checkpoints that stay, and the one being written, fit.

    Args:
        folder: Of the run; it need not exist.
        needed_bytes: Of one checkpoint.
        keep: Complete checkpoints that stay.
    """
    free, all_bytes = free_bytes(folder), needed_bytes * (keep + 1)
    text = f"{free / 1e9:,.1f} GB free in {folder}, {all_bytes / 1e9:,.1f} GB for {keep} + 1 checkpoints"
    if free < needed_bytes:
        return Check("disk space", "fail", text, "not even one fits: free space or choose another --run-dir")
    if free < all_bytes:
        return Check("disk space", "warn", text, "free space or lower checkpoint.keep")
    return Check("disk space", "ok", text)


def measure_write_rate(folder: Path) -> float:
    """Bytes per second to the disk and synced, of one file of this process.

    Raises:
        InputError: the folder cannot be written.
    """
    data = os.urandom(2**20)
    path = folder / f".doctor-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        started_s = time.monotonic()
        with path.open("wb") as file:
            for _ in range(WRITE_BYTES // len(data)):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return WRITE_BYTES / (time.monotonic() - started_s)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        path.unlink(missing_ok=True)


def check_write_rate(rates_bytes_per_s: list[float], needed_bytes: int, grace_s: int) -> Check:
    """How long one checkpoint takes, against the grace time of a stop.

    Args:
        rates_bytes_per_s: Of all nodes, measured at the same time.
        needed_bytes: Of one checkpoint.
        grace_s: From a scheduler's signal to the end.
    """
    total = sum(rates_bytes_per_s)
    save_s = needed_bytes / total
    text = (
        f"{total / 1e6:,.0f} MB/s over {len(rates_bytes_per_s)} node(s), {save_s:,.1f} s for one checkpoint"
    )
    if save_s > grace_s:
        remedy = f"a stop leaves {grace_s} s: use faster storage, more nodes, or a longer launch.grace_s"
        return Check("write rate", "warn", text, remedy)
    return Check("write rate", "ok", text)
