"""What `moe energy sweep` does with its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moe.config import load_config
from moe.energy.grid import parse_grid, parse_share
from moe.energy.steady_state import FULL
from moe.energy.sweep import Swept, sweep
from moe.errors import InputError
from moe.quiet import quiet_third_party


def run_sweep(
    config: Path,
    overrides: Sequence[str],
    *,
    power_caps: str | None,
    clocks: str | None,
    max_slowdown: str,
    allowed: bool,
    world_size: int,
    note: Callable[[str], None],
) -> Swept | None:
    """Train a recipe under each setting; the result, on rank 0.

    Raises:
        InputError: An argument is wrong, changes were not allowed, or rights are missing.
    """
    if (power_caps is None) == (clocks is None):
        raise InputError("give either --power-caps or --clocks")
    grid = parse_grid(power_caps, "power_cap_w") if power_caps else parse_grid(clocks or "", "clock_mhz")
    share = parse_share(max_slowdown)
    if not allowed:
        tried = ", ".join(map(str, grid))
        raise InputError(
            f"this would set {tried} on the GPUs of this machine; ask for it with --allow-power-changes"
        )
    quiet_third_party()
    resolved = load_config(config, list(overrides), world_size=world_size)
    return sweep(resolved, grid, rule=FULL, max_slowdown=share, allowed=allowed, note=note)
