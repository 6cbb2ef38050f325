"""Settings of GPUs to try, as the command line writes them."""

from __future__ import annotations

from dataclasses import dataclass

from moe.errors import InputError


@dataclass(frozen=True)
class Setting:
    """A power cap or a locked clock; neither: as it was found."""

    power_cap_w: float | None = None
    clock_mhz: int | None = None

    def __str__(self) -> str:
        if self.power_cap_w is not None:
            return f"{self.power_cap_w:g} W"
        return "as found" if self.clock_mhz is None else f"{self.clock_mhz} MHz"


AS_FOUND = Setting()


def parse_grid(text: str, kind: str) -> list[Setting]:
    """Settings from `400,500,600` or from `400:600:50`, the end included where a step meets it.

    Args:
        text: Of the user.
        kind: `power_cap_w` or `clock_mhz`.

    Raises:
        InputError: It is neither.
    """
    try:
        if ":" in text:
            first, last, step = (int(part) for part in text.split(":"))
            values = list(range(first, last + 1, step))
        else:
            values = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{text!r} is no grid; write 400,500,600 or FIRST:LAST:STEP") from error
    if not values or min(values) <= 0:
        raise InputError(f"{text!r} has no positive value; write 400,500,600 or FIRST:LAST:STEP")
    return [
        Setting(power_cap_w=value) if kind == "power_cap_w" else Setting(clock_mhz=value) for value in values
    ]


def parse_share(text: str) -> float:
    """A share from `3%` or `0.03`.

    Raises:
        InputError: It is neither, or not in [0, 1).
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise InputError(f"{text!r} is no share; write 3% or 0.03") from error
    if not 0 <= share < 1:
        raise InputError(f"{text!r} must be at least 0 and below 1")
    return share
