"""All that is known of a job, as one object: counts, memory, time, energy, the whole run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moe.counts.checkpoint import host_bytes
from moe.counts.counts import (
    flops_per_token,
    params_active,
    params_active_no_embedding,
    params_total,
)
from moe.planner.campaign import Campaign, campaign
from moe.planner.energy import Energy, step_energy
from moe.planner.evidence import evidence
from moe.planner.memory import GIB, StageMemory, memory_of_stages
from moe.planner.settings import Job
from moe.planner.site import Site
from moe.planner.stages import held_params, stages_of
from moe.planner.step import StepTime, step_time

COMMUNICATION = {"tp": "tp_s", "ep": "ep_s", "pp": "pp_s", "dp": "dp_s"}
ADVICE = {
    "math_s": "matrix products: a lower precision, or fewer parts recomputed",
    "memory_s": "streaming kernels: fused kernels, a larger micro-batch, gradients in bf16",
    "launch_s": "Python cannot launch fast enough: CUDA graphs, a larger micro-batch",
    "tp_s": "tensor parallelism: a smaller parallel.tp",
    "ep_s": "expert exchange: plan.overlap_ep, dispatcher deepep, ep within an NVLink domain, limited nodes",
    "pp_s": "pipeline transfers: plan.overlap_p2p, fewer chunks",
    "bubble_s": "pipeline bubble: more micro-batches, more chunks (parallel.vpp), fewer stages",
    "dp_s": "gradient exchange: parallel.overlap_grad_reduce, gradients in bf16, larger batches",
    "optimizer_s": "optimizer: more data-parallel replicas to share it, moments in bf16",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job and what follows from it.

    Attributes:
        job: What was asked.
        memory: Of every stage.
        time: Of a step.
        energy: Of a step.
        campaign: Of the whole run.
        site: Where.
        engine: Of engine.name.
    """

    job: Job
    memory: tuple[StageMemory, ...]
    time: StepTime
    energy: Energy
    campaign: Campaign
    site: Site
    engine: str = "megatron"

    @property
    def fullest(self) -> StageMemory:
        """The stage that needs most memory."""
        return max(self.memory, key=lambda stage: stage.total_bytes)

    @property
    def short_bytes(self) -> int:
        """Memory that a GPU lacks; 0 if the job fits."""
        return max(0, round(self.fullest.needed_bytes - self.job.gpu.memory_bytes))

    @property
    def short(self) -> dict[str, Any] | None:
        """What a layout that does not fit lacks, in GiB, and the parts that take most; None if it fits."""
        if not self.short_bytes:
            return None
        stage, gpu_bytes = self.fullest, self.job.gpu.memory_bytes
        largest = sorted(stage.parts.items(), key=lambda part: -part[1])[:3]
        return {
            "stage": stage.stage,
            "needed_gib": stage.needed_bytes / GIB,
            "gpu_gib": gpu_bytes / GIB,
            "short_gib": self.short_bytes / GIB,
            "largest_gib": {name: value / GIB for name, value in largest},
        }

    @property
    def save_bytes(self) -> float | None:
        """Memory of a host that a checkpoint takes while it is written, on a node of the fullest stage.

        That is how the Megatron engine saves; None under another one.
        """
        if self.engine != "megatron":
            return None
        ranks = min(self.job.gpu.node_gpus, self.job.layout.gpus)
        held = (sum(held_params(self.job, stage)) for stage in stages_of(self.job))
        return ranks * host_bytes(max(held))

    @property
    def host_bytes(self) -> float:
        """Memory of a host."""
        return self.job.gpu.host_bytes * self.job.gpu.node_gpus

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Speed."""
        return self.job.tokens_per_step / self.time.step_s / self.job.layout.gpus

    @property
    def attack(self) -> str:
        """The cause, matrix products aside, that takes most of a step."""
        causes = {cause: s for cause, s in self.time.spent.parts.items() if cause != "math_s"}
        return max(causes, key=causes.__getitem__)


def make_plan(job: Job, steps: int, site: Site | None = None, *, engine: str = "megatron") -> Plan:
    """Plan `steps` steps of a job at a site."""
    site = site or Site()
    time = step_time(job)
    energy = step_energy(job, time, pue=site.pue)
    return Plan(
        job=job,
        memory=memory_of_stages(job),
        time=time,
        energy=energy,
        campaign=campaign(job, steps, time.step_s, energy, site),
        site=site,
        engine=engine,
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """The object that `moe plan --json` prints."""
    job, time, energy = plan.job, plan.time, plan.energy
    flops = flops_per_token(job.shape, job.seq_length)
    exposed = {kind: getattr(time.spent, cause) for kind, cause in COMMUNICATION.items()}
    values: dict[str, Any] = {
        "params_total": params_total(job.shape),
        "params_active": params_active(job.shape),
        "params_active_no_embedding": params_active_no_embedding(job.shape),
        "flops_per_token": flops,
        "step_s": time.step_s,
        "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu,
        "tflops_per_gpu": plan.tokens_per_s_per_gpu * flops / 1e12,
        "memory_gib_worst_rank": plan.fullest.total_bytes / GIB,
        "exposed_comm_s": sum(exposed.values()),
        "energy_j_per_step": energy.gpu_j,
        "tokens_per_j": energy.tokens_per_j,
    }
    return {
        **values,
        "gpu": job.gpu.name,
        "layout": {**asdict(job.layout), "dp": job.layout.dp, "edp": job.layout.edp},
        "num_microbatches": job.num_microbatches,
        "precision": job.precision,
        "plan": job.plan.model_dump(mode="json"),
        "exposed_comm_s_by_kind": exposed,
        "time_s_by_cause": time.spent.parts,
        "microbatch_s_by_stage": list(time.microbatch_s),
        "forward_share_by_stage": list(time.forward_share),
        "imbalance": time.imbalance,
        "attack": f"{plan.attack}: {ADVICE[plan.attack]}",
        "fits": plan.short_bytes == 0,
        "short_bytes": plan.short_bytes,
        "short": plan.short,
        "save_host_gib_per_node": None if plan.save_bytes is None else plan.save_bytes / GIB,
        "host_gib_per_node": plan.host_bytes / GIB,
        "memory_gib_by_stage": [
            {"stage": stage.stage, **{name: value / GIB for name, value in stage.parts.items()}}
            for stage in plan.memory
        ],
        "energy": asdict(energy),
        "campaign": asdict(plan.campaign),
        "site": plan.site.model_dump(),
        "evidence": evidence(job, values),
    }
