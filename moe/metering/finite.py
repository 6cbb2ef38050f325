"""Numbers of a report that may be missing."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator


def _finite_or_none(value: object) -> object:
    """JSON has no NaN or infinity: a loss that diverged is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# A number that may be missing: not measured, or not finite.
Measured = Annotated[float | None, BeforeValidator(_finite_or_none)]
