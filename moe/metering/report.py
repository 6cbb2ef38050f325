"""`report.json`: what a run did, in one page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from moe.durable import write_atomically
from moe.errors import InputError
from moe.metering.energy import Boundary, Source


def _finite_or_none(value: object) -> object:
    """JSON has no NaN or infinity: a loss that diverged is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# A number that may be missing: not measured, or not finite.
Measured = Annotated[float | None, BeforeValidator(_finite_or_none)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Layout(_Part):
    """Sizes of the tensor, pipeline, expert, context and data parallel groups."""

    tp: int
    pp: int
    ep: int
    cp: int
    dp: int


class Energy(_Part):
    """Gross energy of the run, its idle power beside it and never subtracted.

    Attributes:
        source: How it was obtained; `estimated` means that nothing was measured.
        boundary: What it includes.
        description: One sentence for a person; of an estimate, every constant of the power model.
        total_j: Joules, over all machines; None if a meter failed during the run.
        idle_w: Watts before the work began, over all machines; None where unknown.
    """

    source: Source
    boundary: Boundary
    description: str
    total_j: Measured
    idle_w: Measured


class Report(_Part):
    """The result of a run.

    Attributes:
        schema_version: Changes when a field is renamed, removed or changes its meaning.
        run: Name of the run.
        commit: Git commit of the code; None outside a repository.
        steps: Optimizer steps done, over all starts of the run.
        tokens: Tokens trained on, over all starts.
        params_total: Trained parameters.
        params_active: Parameters that one token uses, embeddings included.
        flops_per_token: Training FLOPs of one token; the convention is in moe.metering.flops.
        loss_first: Training loss of step 1, in nats per token.
        loss_last: Training loss of the last step.
        heldout_loss: Loss on held-out text at the end, in nats per token.
        heldout_bits_per_byte: The same, in bits per byte of text, which does not depend on the tokenizer.
        tokens_per_s: tokens / wall_s.
        wall_s: Seconds in the training loop, evaluation and checkpoints included.
        layout: How the model was split.
        engine: What trained it.
        device: What it ran on, in words.
        energy: What it cost.
        tokens_per_j: tokens / energy.total_j; as much an estimate as energy.source says.
    """

    schema_version: Literal[1] = 1
    run: str
    commit: str | None
    steps: int
    tokens: int
    params_total: int
    params_active: int
    flops_per_token: int
    loss_first: Measured
    loss_last: Measured
    heldout_loss: Measured
    heldout_bits_per_byte: Measured
    tokens_per_s: float
    wall_s: float
    layout: Layout
    engine: str
    device: str
    energy: Energy
    tokens_per_j: Measured


def write_report(path: Path, report: Report) -> None:
    """Write the report as JSON; a reader sees the old file or the new one, never a part."""
    write_atomically(path, report.model_dump_json(indent=2) + "\n")


def read_report(path: Path) -> Report:
    """Read a report.

    Raises:
        InputError: The file is missing or is not a report of this version.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; a run writes it when it ends") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(key) for key in problem["loc"]) or "the file"
        raise InputError(f"{path} is not a report of this version: {where}: {problem['msg']}") from error
