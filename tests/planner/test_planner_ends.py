"""Embeddings and heads that stay wide beside 8-bit weights, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe.planner.bytes_sent import data_gathers
from moe.planner.hardware_file import find_gpu
from moe.planner.memory import memory_of_stages
from moe.planner.settings import Job, load_plan_config, make_job
from moe.planner.stages import stages_of

RECIPE = Path(__file__).parents[2] / "configs" / "qwen3-30b-a3b.yaml"
MATRIX = 151936 * 2048
ROUTERS = 24 * 128 * 2048  # of a stage of 24 layers; they stay in fp32


def two_stages(*, tied: bool, mtp: int, fp8_head: bool, precision: str = "fp8") -> Job:
    layout = ("parallel.pp=2", "parallel.vpp=1", "parallel.stage_layers=[24,24]")
    plan = ("plan.kernels=te", f"plan.precision={precision}", f"plan.fp8_head={str(fp8_head).lower()}")
    job = make_job(load_plan_config(RECIPE, (*layout, *plan)), 16, find_gpu("b200"))
    return replace(job, shape=replace(job.shape, tied=tied, mtp_layers=mtp))


@pytest.mark.parametrize(
    ("tied", "mtp", "fp8_head", "matrices"),
    [
        (False, 0, False, (1, 1)),
        (False, 0, True, (1, 0)),
        (False, 1, False, (1, 2)),  # MTP embeds the next token
        (False, 1, True, (1, 1)),
        (True, 0, False, (1, 1)),
        (True, 0, True, (1, 1)),  # the head is a copy of the embedding
    ],
)
def test_embeddings_stay_wide_wherever_they_are(
    tied: bool, mtp: int, fp8_head: bool, matrices: tuple[int, int]
) -> None:
    """In memory, 1 byte a weight against 2, and in what is gathered, also for MXFP8."""
    narrow = two_stages(tied=tied, mtp=mtp, fp8_head=fp8_head)
    wide = replace(narrow, precision="bf16")
    held = zip(memory_of_stages(narrow), memory_of_stages(wide), strict=True)
    assert [(2 * n.weights - w.weights) / 2 for n, w in held] == [m * MATRIX for m in matrices]
    for eight in (narrow, replace(narrow, precision="mxfp8")):
        for stage, count in zip(stages_of(narrow), matrices, strict=True):
            routers = ROUTERS + (mtp * 128 * 2048 if stage.has_head else 0)
            gathered = [data_gathers(job, stage)[0][1].whole_bytes for job in (eight, wide)]
            # Two bytes more than 16 bits in routers, three more than 8.
            assert gathered[0] - gathered[1] / 2 == count * MATRIX + 2 * routers
