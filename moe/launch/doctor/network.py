"""The network cards of a node, as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

from moe.launch.doctor.check import Check

INFINIBAND = Path("/sys/class/infiniband")


def check_infiniband(nodes: int, root: Path = INFINIBAND) -> Check:
    """State and rate of every InfiniBand or RoCE port.

    Args:
        nodes: Nodes of the job.
        root: Where the kernel lists the cards.
    """
    ports = sorted(root.glob("*/ports/*")) if root.is_dir() else []
    if not ports:
        if nodes == 1:
            return Check("infiniband", "skipped", "no card, and no other node to reach")
        remedy = (
            "NCCL will use TCP, which is slow; check the cards' driver, or the container's access to them"
        )
        return Check("infiniband", "warn", f"no card under {root}", remedy)
    down = [_port_name(port) for port in ports if "ACTIVE" not in _read(port / "state")]
    rates = sorted({_read(port / "rate") for port in ports if _port_name(port) not in down})
    text = f"{len(ports) - len(down)} of {len(ports)} port(s) active, {', '.join(rates) or 'none'}"
    if down:
        remedy = "have cable or switch looked at, or leave the port out with NCCL_IB_HCA"
        return Check("infiniband", "warn", f"{text}; down: {', '.join(down)}", remedy)
    return Check("infiniband", "ok", text)


def _port_name(port: Path) -> str:
    return f"{port.parent.parent.name}:{port.name}"


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""
