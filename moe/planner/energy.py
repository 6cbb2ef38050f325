"""Power by what a GPU is doing, and the energy of a step at four boundaries.

Board power is idle power plus a share of the rest up to the power limit, by phase. The shares give the 624
and 649 W that were measured on H100 (700 W) over whole runs of dense models (OLMo 3, 7B and 32B), whose
steps are about 70 % matrix products, 20 % streaming and 10 % waiting.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.planner.settings import Job
from moe.planner.step import StepTime

# Share of the power between idle and limit. Tensor cores run at the limit, which is why hardware.py gives
# what they sustain; streaming kernels leave them idle; a rank that waits in a collective spins on a few
# SMs.
ACTIVITY = {
    "math_s": 1.0,
    "memory_s": 0.70,
    "launch_s": 0.20,
    "tp_s": 0.40,
    "ep_s": 0.40,
    "pp_s": 0.25,
    "bubble_s": 0.25,
    "dp_s": 0.40,
    "optimizer_s": 0.70,
}
WAITING = 0.25  # of a stage that is faster than the slowest


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy of one step over all GPUs. Each boundary contains those before it.

    Attributes:
        gpu_j: GPU boards, what NVML measures.
        node_j: And hosts: CPU, memory, NICs, fans, power supplies.
        fabric_j: And switches and optics.
        facility_j: And cooling, by the site's PUE.
        gpu_w: Mean power of a board.
        facility_w: Mean power of all.
        tokens_per_j: At the GPU boundary.
        tokens_per_j_facility: At the facility boundary.
    """

    gpu_j: float
    node_j: float
    fabric_j: float
    facility_j: float
    gpu_w: float
    facility_w: float
    tokens_per_j: float
    tokens_per_j_facility: float


def step_energy(job: Job, time: StepTime, *, pue: float) -> Energy:
    """The energy of a step, gross: idle power is part of it."""
    gpu, gpus = job.gpu, job.layout.gpus
    gpu_w = gpu.idle_w + (gpu.tdp_w - gpu.idle_w) * _mean_activity(time)
    gpu_j = gpu_w * time.step_s * gpus
    node_j = gpu_j + gpu.host_w * time.step_s * gpus
    fabric_j = node_j + gpu.fabric_w * time.step_s * gpus
    facility_j = fabric_j * pue
    return Energy(
        gpu_j=gpu_j,
        node_j=node_j,
        fabric_j=fabric_j,
        facility_j=facility_j,
        gpu_w=gpu_w,
        facility_w=facility_j / time.step_s,
        tokens_per_j=job.tokens_per_step / gpu_j,
        tokens_per_j_facility=job.tokens_per_step / facility_j,
    )


def _mean_activity(time: StepTime) -> float:
    """Over the step and the stages: a faster stage does in less time what the slowest does, and waits."""
    slowest = max(time.microbatch_s)
    busy_share = sum(time.microbatch_s) / len(time.microbatch_s) / slowest if slowest else 1.0
    active_s = sum(
        seconds * (ACTIVITY[cause] * busy_share + WAITING * (1 - busy_share))
        for cause, seconds in time.spent.parts.items()
    )
    return active_s / time.step_s
