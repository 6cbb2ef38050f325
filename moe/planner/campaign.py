"""A whole training run: days with failures, energy, emissions, cost, and what a site's power allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe.counts.checkpoint import checkpoint_bytes
from moe.planner.energy import Energy
from moe.planner.settings import Job
from moe.planner.site import Site

HOUR_S = 3600.0
DAY_S = 86_400.0
J_PER_MWH = 3.6e9


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """From the first step to the last.

    Attributes:
        tokens: Of all steps.
        days: Of the calendar, with checkpoints, failures and work done twice.
        goodput: Share of the days that steps of the final run take.
        mtbf_h: Hours between interruptions of the job.
        checkpoint_interval_s: The best one.
        checkpoint_s: Time to write one.
        gpu_hours: GPUs times hours.
        mwh: At the facility boundary.
        t_co2: Of that energy.
        yen: Electricity and GPU-hours.
        site_gpus: GPUs that the site's power supports; 0 if it states none.
        site_days: Days with that many, if speed grows with their number.
    """

    tokens: int
    days: float
    goodput: float
    mtbf_h: float
    checkpoint_interval_s: float
    checkpoint_s: float
    gpu_hours: float
    mwh: float
    t_co2: float
    yen: float
    site_gpus: int
    site_days: float


def campaign(job: Job, steps: int, step_s: float, energy: Energy, site: Site) -> Campaign:
    """What `steps` steps take at a site."""
    gpus = job.layout.gpus
    mtbf_s = site.mtbf_gpu_hours * HOUR_S / gpus
    checkpoint_s = _checkpoint_bytes(job) / (site.checkpoint_bytes_per_s * gpus)
    interval_s = best_interval_s(checkpoint_s, mtbf_s)
    share = goodput(checkpoint_s, interval_s, mtbf_s, site.restart_s)
    elapsed_s = steps * step_s / share
    facility_j = energy.facility_w * elapsed_s
    mwh = facility_j / J_PER_MWH
    gpu_hours = gpus * elapsed_s / HOUR_S
    site_gpus = int(site.power_w / (energy.facility_w / gpus))
    return Campaign(
        tokens=steps * job.tokens_per_step,
        days=elapsed_s / DAY_S,
        goodput=share,
        mtbf_h=mtbf_s / HOUR_S,
        checkpoint_interval_s=interval_s,
        checkpoint_s=checkpoint_s,
        gpu_hours=gpu_hours,
        mwh=mwh,
        t_co2=mwh * site.grid_g_per_kwh / 1000,
        yen=mwh * 1000 * site.yen_per_kwh + gpu_hours * site.yen_per_gpu_hour,
        site_gpus=site_gpus,
        site_days=elapsed_s / DAY_S * gpus / site_gpus if site_gpus else 0.0,
    )


def best_interval_s(checkpoint_s: float, mtbf_s: float) -> float:
    """Seconds between checkpoints that lose the least: sqrt(2 d M) (Young, CACM 1974).

    Valid while the write takes far less than the time between failures; else one checkpoint a failure.
    """
    return min(math.sqrt(2 * checkpoint_s * mtbf_s), mtbf_s)


def goodput(checkpoint_s: float, interval_s: float, mtbf_s: float, restart_s: float) -> float:
    """Share of the time that is not lost to checkpoints, to restarts and to half an interval a failure.

    First order in interval / MTBF (Daly, FGCS 2006).
    """
    if interval_s == 0.0:
        return mtbf_s / (mtbf_s + restart_s)
    overhead = checkpoint_s / interval_s + (interval_s / 2 + restart_s) / mtbf_s
    return 1 / (1 + overhead)


def _checkpoint_bytes(job: Job) -> int:
    moment_bytes = 4 if job.plan.moments == "fp32" else 2
    return checkpoint_bytes(job.shape, weight_bytes=job.wide_bytes, muon=job.muon, moment_bytes=moment_bytes)
