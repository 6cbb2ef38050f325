"""What one line of a tokens-per-joule result file may say; its JSON schema is published beside this file.

python -m benchmarks.tokens_per_joule_record     writes benchmarks/tokens_per_joule.schema.json anew

Every line is checked before it is written, and again when it is read. A figure of energy without its source
or boundary is no line of such a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from benchmarks.ab_statistics import Verdict
from moe.durable import write_atomically
from moe.errors import InputError
from moe.metering.boundaries import Level
from moe.metering.energy import Boundary, Source, Validity
from moe.metering.report import CrossCheck, Spread

SCHEMA_FILE = Path(__file__).with_name("tokens_per_joule.schema.json")
FLOPS_CONVENTION = (
    "forward and backward: 6 x matmul parameters on a token's path (no input embedding, router or norms) "
    "+ 6 x layers x (s / 2) x heads x (d_qk + d_v)"
)

Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]


class Part(BaseModel):
    """Base of all parts: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EnergyFigure(Part):
    """Gross joules and what they mean; idle power is beside them and never subtracted.

    Attributes:
        joules: of the window, or until the target loss.
        validity_detail: one sentence on `validity`, with both figures where there are two.
        cross_check: of the whole training that the joules are a part of; null with one instrument only.
        spread: of the same, over its devices; null where the meter cannot tell them apart.
        levels: of the same, at the meter's boundary and at every one around it.
    """

    joules: Positive
    source: Source
    boundary: Boundary
    validity: Validity
    validity_detail: Text
    description: Text
    idle_w: float | None
    cross_check: CrossCheck | None
    spread: Spread | None
    levels: tuple[Level, ...]


class Software(Part):
    """What ran."""

    commit: str | None
    python: str
    torch: str
    triton: str | None


class Machine(Part):
    """What it ran on. Settings that were not read are null, never guessed."""

    device: Text
    ranks: Annotated[int, Field(ge=1)]
    logical_cpus: int | None
    gpu_uuids: list[str]
    driver: str | None
    power_limit_w: list[float] | None
    default_power_limit_w: list[float] | None
    sm_clock_mhz: list[int] | None
    temperature_c: list[int] | None
    throttle_reasons: list[str] | None


class Work(Part):
    """What was trained."""

    config: Text
    overrides: list[str]
    config_sha256: Text
    params_total: int
    params_active: int
    flops_per_token: int
    flops_convention: Text
    precision: Text
    expert_precision: Text
    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    recompute: str
    layout: dict[str, int]
    engine: Text
    weights: Text


class PeakShare(Part):
    """Model FLOP/J over what a data sheet would give: peak FLOP/s over the board's power limit."""

    percent: Positive
    peak_flop_per_j: Positive
    basis: Text


class Leg(Part):
    """One steady window of training.

    Attributes:
        role: `a` is the config that the verdict is on, `b` what it is compared with.
        routing: `natural` is the headline; `forced_balance` gives every expert the same load, which no
            trained router does: an upper bound.
    """

    kind: Literal["leg"]
    schema_version: Literal[1]
    run_id: Text
    time: Text
    mode: Literal["full", "short"]
    role: Literal["a", "b"]
    repeat: int
    routing: Literal["natural", "forced_balance"]
    is_upper_bound: bool
    power_cap_w: float | None
    work: Work
    machine: Machine
    software: Software
    first_step: int
    last_step: int
    tokens: int
    seconds: Positive
    settled: bool
    settle_s: float
    loss_start: float
    loss_end: float
    energy: EnergyFigure
    tokens_per_s: Positive
    tokens_per_j: Positive
    active_param_tokens_per_j: Positive
    model_flop_per_j: Positive
    of_peak: list[PeakShare]


class Estimate(Part):
    """A mean over repeats and its 95 % interval; both ends are null where one repeat gives none."""

    mean: Positive
    ci95_low: float | None
    ci95_high: float | None
    repeats: int


class EnergyLabel(Part):
    """Where the joules behind a summary come from."""

    source: Source
    boundary: Boundary
    validity: Validity


class Summary(Part):
    """All legs of one config under one routing and one power cap."""

    kind: Literal["summary"]
    schema_version: Literal[1]
    run_id: Text
    mode: Literal["full", "short"]
    role: Literal["a", "b"]
    name: Text
    routing: Literal["natural", "forced_balance"]
    is_upper_bound: bool
    power_cap_w: float | None
    energy: EnergyLabel
    tokens_per_j: Estimate
    active_param_tokens_per_j: Estimate
    model_flop_per_j: Estimate
    tokens_per_s: Estimate
    of_peak: list[PeakShare]


class AgainstRecord(Part):
    """The verdict on config a: its tokens per joule over those of config b, natural routing."""

    kind: Literal["comparison"]
    schema_version: Literal[1]
    run_id: Text
    mode: Literal["full", "short"]
    a: Text
    b: Text
    power_cap_w: float | None
    energy: EnergyLabel
    ratio: Estimate
    pair_ratios: list[float]
    drift_per_leg: float
    autocorrelation: float
    resolution: float
    verdict: Verdict
    method: Text


class TargetLoss(Part):
    """Joules until the held-out loss reaches a target, for one seed, evaluations included."""

    kind: Literal["target_loss"]
    schema_version: Literal[1]
    run_id: Text
    role: Literal["a", "b"]
    name: Text
    seed: int
    target_loss: Positive
    reached: bool
    steps: int
    tokens: int
    heldout_loss: float
    energy: EnergyFigure


class TargetLossSummary(Part):
    """Joules to a target loss over all seeds; null where a seed did not reach it."""

    kind: Literal["target_loss_summary"]
    schema_version: Literal[1]
    run_id: Text
    role: Literal["a", "b"]
    name: Text
    target_loss: Positive
    seeds: int
    reached: int
    energy: EnergyLabel
    joules: Estimate | None


class TargetLossAgainst(Part):
    """Joules of config b over those of config a to the same loss, seed by seed; above 1: a needs fewer."""

    kind: Literal["target_loss_comparison"]
    schema_version: Literal[1]
    run_id: Text
    a: Text
    b: Text
    target_loss: Positive
    energy: EnergyLabel
    ratio: Estimate
    verdict: Verdict


Record = Leg | Summary | AgainstRecord | TargetLoss | TargetLossSummary | TargetLossAgainst
_RECORD: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def check(values: dict[str, Any]) -> Record:
    """A record from plain values.

    Raises:
        InputError: They break the schema; the text names the key.
    """
    try:
        return _RECORD.validate_python(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"][1:]) or "kind"
        raise InputError(f"a record of the result file is wrong: {where}: {problem['msg']}") from error


def write_lines(path: Path, records: list[Record]) -> None:
    """Replace a result file: one JSON object a line, each checked once more as it will be read."""
    lines = [record.model_dump_json() for record in records]
    for line in lines:
        check(json.loads(line))
    write_atomically(path, "".join(line + "\n" for line in lines))


def read_lines(path: Path) -> list[Record]:
    """The records of a result file.

    Raises:
        InputError: A line breaks the schema.
    """
    return [check(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def schema_text() -> str:
    """The JSON schema (draft 2020-12) of one line."""
    schema = _RECORD.json_schema()
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "One line of a tokens-per-joule result file",
    }
    return json.dumps(head | schema, indent=1) + "\n"


if __name__ == "__main__":
    write_atomically(SCHEMA_FILE, schema_text())
