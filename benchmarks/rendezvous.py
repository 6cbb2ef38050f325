"""A new meeting place for each job of ranks that torchrun started once.

torchrun's store keeps the addresses of the first job, and ranks that meet there again would call old ports.
"""

from __future__ import annotations

import datetime
import os
import socket

from torch.distributed import TCPStore

TIMEOUT = datetime.timedelta(minutes=5)


class Rendezvous:
    """Gives the ranks a fresh MASTER_PORT; does nothing in a job of one process without torchrun."""

    def __init__(self) -> None:
        """Reach torchrun's store, through which the ranks agree on ports."""
        self._count = 0
        self._store: TCPStore | None = None
        if "RANK" in os.environ:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = TCPStore(address, port, is_master=False, timeout=TIMEOUT)

    def renew(self) -> None:
        """Let the next job meet at a port of its own; to be called by every rank."""
        if self._store is None:
            return
        key = f"joulemoe/port/{self._count}"
        self._count += 1
        if os.environ["RANK"] == "0":
            self._store.set(key, str(_free_port()))
        os.environ["MASTER_PORT"] = self._store.get(key).decode()
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
