"""Joules at every boundary: what is added from which constant, what stays unknown, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from moe.errors import InputError
from moe.metering.boundaries import Level, Surroundings, stack_levels
from moe.metering.report import Energy, Report, read_report, write_report

AROUND = Surroundings(
    num_gpus=16,
    num_machines=2,
    wall_s=100.0,
    host_w_per_gpu=575.0,
    fabric_w_per_gpu=251.0,
    pue=1.2,
    pue_source="the operator, FY2026",
)
GPUS = Level(boundary="gpu", basis="measured", source="nvml_counter", energy_j=700.0 * 16 * 100)


def test_levels_of_measured_gpus_are_stacked_and_only_the_first_is_measured() -> None:
    gpu, node, fabric, facility = stack_levels(GPUS, AROUND)
    assert [level.basis for level in (gpu, node, fabric, facility)] == ["measured", *["estimated"] * 3]
    per_gpu_w = [level.energy_j / 1600 for level in (gpu, node, fabric, facility)]  # type: ignore[operator]
    assert per_gpu_w == pytest.approx([700, 1275, 1526, 1831.2])
    assert node.energy_j / gpu.energy_j == pytest.approx(10.2 / 5.6)  # type: ignore[operator]
    assert "575 W" in node.source
    assert "251 W" in fabric.source
    assert "PUE 1.2 (the operator, FY2026)" in facility.source


def test_measured_node_replaces_the_estimate_and_carries_outwards() -> None:
    node = Level(boundary="node", basis="measured", source="a BMC", energy_j=2e6)
    levels = stack_levels(GPUS, AROUND, node=node)
    assert levels[1] is node
    assert levels[2].energy_j == pytest.approx(2e6 + 251 * 1600)
    assert [level.basis for level in levels] == ["measured", "measured", "estimated", "estimated"]


def test_one_machine_has_no_fabric_to_estimate() -> None:
    node = Level(boundary="node", basis="measured", source="a BMC", energy_j=2e6)
    _, _, fabric, _ = stack_levels(GPUS, replace(AROUND, num_machines=1), node=node)
    assert (fabric.basis, fabric.energy_j) == ("measured", 2e6)


def test_what_no_constant_is_stated_for_stays_unknown_outwards() -> None:
    packages = Level(boundary="cpu_package", basis="measured", source="rapl", energy_j=5.0)
    levels = stack_levels(packages, replace(AROUND, num_gpus=0))
    assert [(level.basis, level.energy_j) for level in levels[1:]] == [("unknown", None)] * 3
    assert "no constant makes a machine of cpu_package" in levels[1].source
    *_, facility = stack_levels(GPUS, replace(AROUND, pue=0, pue_source=""))
    assert (facility.basis, "energy.pue" in facility.source) == ("unknown", True)


def test_starts_of_another_size_leave_what_is_added_for_each_gpu_unknown() -> None:
    _, node, fabric, facility = stack_levels(GPUS, replace(AROUND, gpus_vary=True))
    assert {(level.basis, level.energy_j) for level in (node, fabric, facility)} == {("unknown", None)}
    assert "different numbers of GPUs" in node.source
    bmc = Level(boundary="node", basis="measured", source="a BMC", energy_j=2e6)
    for around in (
        replace(AROUND, gpus_vary=True),
        replace(AROUND, machines_vary=True),
        replace(AROUND, machines_vary=True, num_machines=1),
    ):
        _, node, fabric, _ = stack_levels(GPUS, around, node=bmc)
        assert (node.basis, fabric.basis) == ("measured", "unknown")
        assert "different numbers of GPUs or machines" in fabric.source


def test_measured_machine_below_the_gpus_inside_it_is_refused() -> None:
    node = Level(boundary="node", basis="measured", source="a BMC", energy_j=1.1e6)
    _, *outside = stack_levels(GPUS, AROUND, node=node)
    assert {(level.basis, level.energy_j) for level in outside} == {("unknown", None)}
    assert "1.1e+06 J (a BMC), but 1.12e+06 J of gpu inside it" in outside[0].source


def test_failed_meter_has_no_figure_at_any_boundary() -> None:
    levels = stack_levels(GPUS.model_copy(update={"energy_j": None}), AROUND)
    assert {level.energy_j for level in levels} == {None}


@pytest.mark.parametrize("missing", ["source", "boundary", "basis"])
def test_report_without_a_levels_source_or_boundary_fails_validation(
    missing: str, tmp_path: Path, make_report: Callable[..., Report]
) -> None:
    path = tmp_path / "report.json"
    write_report(path, make_report())
    raw = json.loads(path.read_text())
    del raw["energy"]["levels"][0][missing]
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match=rf"energy\.levels\.0\.{missing}"):
        read_report(path)


@pytest.mark.parametrize("missing", ["source", "boundary", "validity", "levels", "description"])
def test_report_without_a_label_of_energy_fails_validation(
    missing: str, tmp_path: Path, make_report: Callable[..., Report]
) -> None:
    path = tmp_path / "report.json"
    write_report(path, make_report())
    raw = json.loads(path.read_text())
    del raw["energy"][missing]
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match=rf"energy\.{missing}"):
        read_report(path)


def test_labels_that_contradict_each_other_fail_validation(
    make_energy: Callable[..., Energy], make_report: Callable[..., Report]
) -> None:
    levels = make_energy(source="nvml_counter", boundary="gpu").levels
    assert [level.boundary for level in levels] == ["gpu", "node", "fabric", "facility"]
    for wrong, words in (
        ({"levels": ()}, "boundaries are missing"),
        ({"levels": levels[:2]}, "in the order node, fabric, facility"),
        ({"levels": (levels[0], *levels[2:])}, "in the order"),
        ({"levels": levels, "total_j": 99.0}, "first level"),
        ({"levels": levels, "boundary": "module"}, "first level"),
        ({"levels": levels, "source": "estimated"}, "source estimated is called measured"),
        ({"total_j": None}, "without a figure"),
        ({"description": ""}, "description"),
    ):
        with pytest.raises(ValidationError, match=words):
            make_energy(**{"source": "nvml_counter", "boundary": "gpu"} | wrong)
    with pytest.raises(ValidationError, match="tokens_per_j of invalid energy"):
        make_report(energy={"validity": "invalid"})
    with pytest.raises(ValidationError, match="unknown and yet has"):
        Level(boundary="node", basis="unknown", source="why", energy_j=1.0)
    with pytest.raises(ValidationError, match="source"):
        Level(boundary="node", basis="measured", source="", energy_j=1.0)
