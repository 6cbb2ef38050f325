"""`report.json`: what a run did, in one page."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from moe.durable import write_atomically
from moe.errors import InputError
from moe.metering.boundaries import Level, Sentence, check_order
from moe.metering.energy import Boundary, Source, Validity
from moe.metering.finite import Measured


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Layout(_Part):
    """Sizes of the tensor, pipeline, expert, context, data and expert tensor parallel groups."""

    tp: int
    pp: int
    ep: int
    cp: int
    dp: int
    etp: int = 1


class Spread(_Part):
    """How unequal the devices of the job were, over its newest start.

    Attributes:
        devices: How many.
        min_j: Joules of the thriftiest.
        median_j: Of the median.
        max_j: Of the greediest.
        min_device: Name of the thriftiest.
        max_device: Name of the greediest.
    """

    devices: int
    min_j: float
    median_j: float
    max_j: float
    min_device: Sentence
    max_device: Sentence


class CrossCheck(_Part):
    """Two instruments over the same time of the newest start, summed over devices.

    Attributes:
        counter_j: Joules of the counters, which are those reported.
        trace_j: Joules of the independent power trace.
        window_s: Seconds that both saw.
    """

    counter_j: float
    trace_j: float
    window_s: float


class Energy(_Part):
    """Gross energy of the run, its idle power beside it and never subtracted.

    Attributes:
        source: How it was obtained; `estimated` means that nothing was measured.
        boundary: What it includes.
        description: One sentence for a person; of an estimate, every constant of the power model.
        total_j: Joules, over all machines and starts; None if a meter failed during the run.
        idle_w: Watts before the work began, over all machines; None where unknown.
        validity: Whether a second instrument supports it, in the newest start; `invalid`, also for the sake
            of an earlier start, is not to be quoted.
        validity_detail: One sentence for a person, with both figures where there are two.
        cross_check: Both figures; None where there is one instrument only.
        spread: Devices told apart; None where the meter cannot.
        levels: The joules at this boundary and at every one around it.
    """

    source: Source
    boundary: Boundary
    description: Sentence
    total_j: Measured
    idle_w: Measured
    validity: Validity
    validity_detail: Sentence
    cross_check: CrossCheck | None
    spread: Spread | None
    levels: tuple[Level, ...]

    @model_validator(mode="after")
    def _levels_belong(self) -> Self:
        check_order(self.levels)
        first = self.levels[0]
        if first.boundary != self.boundary or first.energy_j != self.total_j:
            raise ValueError("the first level must be the meter's: the same boundary and joules")
        if (first.basis == "estimated") != (self.source == "estimated"):
            raise ValueError(f"source {self.source} is called {first.basis}")
        if self.total_j is None and self.validity != "invalid":
            raise ValueError("energy without a figure must be called invalid")
        return self


class Campaign(_Part):
    """What the run cost over all its starts, lost work included.

    Attributes:
        starts: How often it was started.
        campaign_j: All joules while it ran: steps, evaluations, checkpoints, steps lost and done again.
        useful_j: Joules of the steps that led to the final state, each counted once.
        goodput: useful_j / campaign_j.
    """

    starts: int
    campaign_j: Measured
    useful_j: Measured
    goodput: Measured


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
        flops_per_token: Training FLOPs of one token; the convention is in moe.counts.counts.
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
        tokens_per_j: tokens / energy.total_j; as much an estimate as energy.source says; None where
            energy.validity is `invalid`.
        campaign: Energy over all starts, and its useful share.
    """

    schema_version: Literal[2] = 2
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
    campaign: Campaign

    @model_validator(mode="after")
    def _invalid_energy_makes_no_figure(self) -> Self:
        if self.energy.validity == "invalid" and self.tokens_per_j is not None:
            raise ValueError("tokens_per_j of invalid energy must be null")
        return self


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
