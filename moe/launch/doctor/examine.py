"""All checks over all ranks of a job, or over one process alone."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from moe.config.schema import RunConfig
from moe.counts.checkpoint import run_checkpoint_bytes, run_host_bytes
from moe.errors import InputError
from moe.launch.doctor import collectives, disk, gpu, host, network, software
from moe.launch.doctor.check import Check
from moe.launch.doctor.report import NodeReport, Report
from moe.ranks import local_rank, on_every_rank

# A node that does not answer in this time is what doctor is there to find.
TIMEOUT = datetime.timedelta(seconds=120)


@dataclass(frozen=True, kw_only=True)
class Patient:
    """What is examined.

    Attributes:
        config: The run that is to start; None leaves out what depends on it.
        run_dir: Its folder; None leaves the disk out.
        grace_s: From a scheduler's signal to the end of a job.
    """

    config: RunConfig | None
    run_dir: Path | None
    grace_s: int


def examine(patient: Patient) -> Report:
    """Check every node and what is between them; collective over the ranks that torchrun started, if any.

    Returns:
        The same report on every rank.

    Raises:
        DistError: the ranks cannot reach each other at all.
    """
    _join()
    try:
        return _examine(patient)
    finally:
        dist.destroy_process_group()


def _join() -> None:
    # Results are gathered over gloo whatever the GPUs' network does.
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1, timeout=TIMEOUT)


def _examine(patient: Patient) -> Report:
    places = on_every_rank(local_rank)
    leaders = [rank for rank, place in enumerate(places) if place == 0]
    ranks_here = _ranks_of_this_node(leaders, dist.get_world_size())
    # Nodes are checked at the same time, so that a shared disk is measured under the job's load.
    parts = on_every_rank(
        lambda: _check_node(patient, ranks_here, len(leaders)) if local_rank() == 0 else None
    )
    found = [part for part in parts if part is not None]
    reports = [report for report, _ in found]
    return Report(reports, [*_compare(reports), *_check_job(patient, [rate for _, rate in found])])


def _ranks_of_this_node(leaders: Sequence[int], world_size: int) -> int:
    first = max(leader for leader in leaders if leader <= dist.get_rank())
    return min([leader for leader in leaders if leader > first], default=world_size) - first


def _check_node(patient: Patient, ranks: int, nodes: int) -> tuple[NodeReport, float | None]:
    """The checks of one node, and the rate at which it writes, in bytes/s."""
    checks = [software.check_versions(), *_check_gpus(patient, ranks), network.check_infiniband(nodes)]
    if patient.config is None or patient.config.engine.kernels != "torch":
        checks.append(software.check_triton(has_gpu=torch.cuda.is_available()))
    dispatcher = "" if patient.config is None else patient.config.parallel.dispatcher
    if dispatcher in ("deepep", "hybridep"):
        checks.append(software.check_dispatcher(dispatcher))
    if patient.config is not None and patient.config.engine.name == "megatron":
        checks.append(host.check_save_memory(run_host_bytes(patient.config), ranks))
    rate = None
    if patient.run_dir is not None:
        try:
            rate = disk.measure_write_rate(patient.run_dir)
        except InputError as error:
            checks.append(Check("write rate", "fail", str(error), "choose a --run-dir that can be written"))
    return NodeReport(platform.node(), checks), rate


def _check_gpus(patient: Patient, ranks: int) -> Iterator[Check]:
    visible = torch.cuda.device_count()
    nvml = gpu.open_nvml()
    if isinstance(nvml, Check):
        wanted = patient.config is not None and patient.config.engine.device == "cuda"
        if wanted:
            nvml = replace(nvml, status="fail", remedy="engine.device=cuda needs one; see nvidia-smi")
        elif visible:
            nvml = replace(nvml, status="warn", value=f"torch sees {visible} GPU(s), but {nvml.value}")
        yield nvml
        return
    yield gpu.check_count(nvml, visible, ranks)
    questions: tuple[Callable[[gpu.Nvml], Check], ...] = (
        gpu.check_driver,
        gpu.check_health,
        gpu.check_clocks,
        gpu.check_free_memory,
        gpu.check_nvlink,
        gpu.check_energy,
    )
    for question in questions:
        yield _asked(nvml, question)


def _asked(nvml: gpu.Nvml, question: Callable[[gpu.Nvml], Check]) -> Check:
    """A check, or that NVML has no answer."""
    try:
        return question(nvml)
    except nvml.module.NVMLError as error:
        name = question.__name__.removeprefix("check_").replace("_", " ")
        return Check(name, "warn", f"NVML does not say: {error}", "update the driver")


def _compare(nodes: Sequence[NodeReport]) -> Iterator[Check]:
    for name in ("versions", "driver", "gpu count"):
        values = [check.value for node in nodes for check in node.checks if check.name == name]
        if len(values) > 1:
            yield software.check_same(name, values)


def _check_job(patient: Patient, rates: Sequence[float | None]) -> Iterator[Check]:
    """What concerns all nodes together; collective."""
    yield from _check_disk(patient, rates)
    yield collectives.check_clock_skew()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    group: Any = None
    if cuda:
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl", timeout=TIMEOUT)
    yield collectives.check_all_reduce(device, group, nodes=len(rates))
    yield collectives.check_all_to_all(device, group, nodes=len(rates))


def _check_disk(patient: Patient, rates: Sequence[float | None]) -> Iterator[Check]:
    known = [rate for rate in rates if rate is not None]
    if patient.config is None or patient.run_dir is None:
        remedy = "moe doctor CONFIG checks that its checkpoints fit"
        yield Check("disk space", "skipped", "no config was given", remedy)
        return
    needed = run_checkpoint_bytes(patient.config)
    yield disk.check_space(patient.run_dir, needed, patient.config.checkpoint.keep)
    if len(known) == len(rates):
        yield disk.check_write_rate(known, needed, patient.grace_s)
