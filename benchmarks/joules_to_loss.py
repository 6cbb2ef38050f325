"""Joules until the held-out loss reaches a target: efficiency at matched quality.

Tokens per joule alone reward a model that learns less from a token. Here each seed trains until an evaluation
is at or below the target; between the last two evaluations the joules are interpolated. Everything counts,
evaluations too. Both configs see the same data in the same order for the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.ab_statistics import Verdict, mean_interval
from benchmarks.tokens_per_joule_legs import Case, Session, energy_figure
from benchmarks.tokens_per_joule_record import (
    TargetLoss,
    TargetLossAgainst,
    TargetLossSummary,
    check,
)
from benchmarks.tokens_per_joule_summary import estimate, label
from moe.energy.training_leg import train_watched
from moe.metering.energy import EnergyMeterError


class TargetWatch:
    """Stops the training at the first evaluation at or below the target."""

    def __init__(self, target: float) -> None:
        """Begin."""
        self.target = target
        self.evaluations: list[Mapping[str, Any]] = []

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one step; only those with an evaluation count."""
        if record.get("heldout_loss") is not None:
            self.evaluations.append(record)

    @property
    def done(self) -> bool:
        """Whether the target is reached."""
        return bool(self.evaluations) and self.evaluations[-1]["heldout_loss"] <= self.target

    def at_target(self, key: str) -> float:
        """A running total where the loss crosses the target; if it never does, at the last evaluation.

        Raises:
            EnergyMeterError: the total is of a meter that failed.
        """
        values = [record[key] for record in self.evaluations[-2:]]
        if any(value is None for value in values):
            raise EnergyMeterError(f"{key} is not known at the target: the meter failed during the run")
        if not self.done or len(values) == 1:
            return float(values[-1])
        before, after = (record["heldout_loss"] for record in self.evaluations[-2:])
        share = (before - self.target) / (before - after)
        return float(values[0] + share * (values[1] - values[0]))


def run_to_loss(case: Case, session: Session, target: float) -> TargetLoss | None:
    """Train one seed; collective. The record, on rank 0."""
    watch = TargetWatch(target)
    trained = train_watched(case.config, lambda _: watch, session.note)
    if trained is None:
        return None
    last = watch.evaluations[-1]
    record = check(
        {
            "kind": "target_loss",
            "schema_version": 1,
            "run_id": session.run_id,
            "role": case.role,
            "name": case.name,
            "seed": case.config.run.seed,
            "target_loss": target,
            "reached": watch.done,
            "steps": last["step"],
            "tokens": round(watch.at_target("tokens")),
            "heldout_loss": last["heldout_loss"],
            "energy": energy_figure(trained, watch.at_target("energy_j")),
        }
    )
    assert isinstance(record, TargetLoss)
    return record


def summarize(found: Sequence[TargetLoss]) -> TargetLossSummary:
    """Mean joules over seeds; none if a seed did not get there, for leaving it out would flatter."""
    reached = [each for each in found if each.reached]
    joules = None
    if len(reached) == len(found):
        joules = estimate(mean_interval([each.energy.joules for each in found]), len(found))
    return TargetLossSummary(
        kind="target_loss_summary",
        schema_version=1,
        run_id=found[0].run_id,
        role=found[0].role,
        name=found[0].name,
        target_loss=found[0].target_loss,
        seeds=len(found),
        reached=len(reached),
        energy=label(found),
        joules=joules,
    )


def judge(a: Sequence[TargetLoss], b: Sequence[TargetLoss]) -> TargetLossAgainst | None:
    """The verdict on a: joules of b over joules of a, paired by seed; None if a seed did not get there."""
    if not all(each.reached for each in (*a, *b)) or len(a) < 2:
        return None
    ratios = mean_interval([other.energy.joules / own.energy.joules for own, other in zip(a, b, strict=True)])
    assert ratios.low is not None and ratios.high is not None
    energy = label([*a, *b])
    real = energy.validity != "invalid"
    verdict: Verdict = "inconclusive"
    if real and (ratios.low > 1 or ratios.high < 1):
        verdict = "better" if ratios.low > 1 else "worse"
    return TargetLossAgainst(
        kind="target_loss_comparison",
        schema_version=1,
        run_id=a[0].run_id,
        a=a[0].name,
        b=b[0].name,
        target_loss=a[0].target_loss,
        energy=energy,
        ratio=estimate(ratios, len(a)),
        verdict=verdict,
    )
