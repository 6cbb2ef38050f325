"""`moe doctor`: every check can pass, warn and fail, and the command says so on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fake_deep_ep import double
from train_runs import REPOSITORY, command, environment

from moe.config import load_config
from moe.counts.checkpoint import params_of_muon, run_checkpoint_bytes, run_host_bytes
from moe.counts.shape import shape_of
from moe.launch.doctor import collectives, disk, gpu, host
from moe.launch.doctor.check import Check, worst
from moe.launch.doctor.examine import Patient, _check_node
from moe.launch.doctor.network import check_infiniband
from moe.launch.doctor.report import NodeReport, Report
from moe.launch.doctor.software import check_dispatcher, check_same, check_triton, check_versions
from moe.planner.hardware_file import find_gpu
from moe.planner.plan import make_plan
from moe.planner.settings import load_plan_config, make_job

RECIPE = REPOSITORY / "configs" / "quickstart.yaml"


class FakeNvml:
    """Two healthy GPUs; a test changes what it is about. Names are those of pynvml."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    class NVMLError_InvalidArgument(NVMLError):
        pass

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
    nvmlClocksEventReasonHwSlowdown = 0x08
    nvmlClocksEventReasonSwThermalSlowdown = 0x20
    nvmlClocksEventReasonHwThermalSlowdown = 0x40
    nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80

    def __init__(self) -> None:
        self.errors = [0, 0]
        self.rows = [(0, 0, 0, 0), (3, 0, 0, 0)]
        self.reasons = [0x4, 0x4]  # the software power cap, which is no fault
        self.used_bytes = [2**20, 2**20]
        self.links = [18, 18]
        self.power_mw = [400_000, 500_000]
        self.counted_w = [400.0, 500.0]
        self.energy_mj = [10.0, 20.0]

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 13000

    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, counter: int) -> int:
        return self.errors[handle]

    def nvmlDeviceGetRemappedRows(self, handle: int) -> tuple[int, int, int, int]:
        return self.rows[handle]

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return 1755

    def nvmlDeviceGetMaxClockInfo(self, handle: int, kind: int) -> int:
        return 1980

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> int:
        return 41

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        return self.reasons[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=self.used_bytes[handle])

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if self.links[handle] < 0:
            raise self.NVMLError_NotSupported
        return int(link < self.links[handle])

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return int(self.energy_mj[handle])

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self.power_mw[handle]

    def run(self, seconds: float) -> None:
        """Let time pass, as time.sleep does."""
        self.energy_mj = [
            energy + power * seconds * 1e3
            for energy, power in zip(self.energy_mj, self.counted_w, strict=True)
        ]


# What is broken, by which check it is found, as what, and in which words.
BROKEN = [
    ({"errors": [0, 2]}, gpu.check_health, "fail", "GPU 1: 2 uncorrected"),
    ({"rows": [(0, 0, 1, 0), (0, 0, 0, 0)]}, gpu.check_health, "fail", "GPU 0: row remapping is pending"),
    ({"rows": [(0, 0, 0, 0), (0, 9, 0, 1)]}, gpu.check_health, "fail", "GPU 1: row remapping failed"),
    ({"reasons": [0x4, 0x40]}, gpu.check_clocks, "fail", "GPU 1: hardware thermal slowdown"),
    ({"reasons": [0x80, 0]}, gpu.check_clocks, "fail", "GPU 0: power brake"),
    ({"used_bytes": [0, 40 * 2**30]}, gpu.check_free_memory, "warn", "GPU 1: 40.0 GiB"),
    ({"links": [18, 17]}, gpu.check_nvlink, "fail", "[18, 17]"),
    ({"links": [-1, -1]}, gpu.check_nvlink, "warn", "[0, 0]"),
]
CHECKS = [gpu.check_driver, gpu.check_health, gpu.check_clocks, gpu.check_free_memory, gpu.check_nvlink]


@pytest.mark.parametrize("check", CHECKS)
def test_healthy_gpus_pass(check):
    found = check(gpu.open_nvml(FakeNvml()))
    assert (found.status, found.remedy) == ("ok", "")


@pytest.mark.parametrize(("fault", "check", "status", "words"), BROKEN)
def test_fault_of_a_gpu_is_named_with_a_remedy(fault, check, status, words):
    nvml = FakeNvml()
    vars(nvml).update(fault)
    found = check(gpu.open_nvml(nvml))
    assert found.status == status
    assert words in found.value
    assert found.remedy


def test_missing_gpu_fails():
    nvml = gpu.open_nvml(FakeNvml())
    assert gpu.check_count(nvml, visible=2, ranks=2).status == "ok"
    assert gpu.check_count(nvml, visible=1, ranks=2).status == "fail"


@pytest.mark.parametrize(
    ("counted_w", "status"),
    [
        ([400, 500], "ok"),
        ([300, 600], "ok"),
        ([0, 500], "fail"),
        ([400_000, 500], "fail"),
        ([100, 500], "fail"),
    ],
)
def test_energy_counter_must_agree_with_the_power_reading(counted_w, status):
    nvml = FakeNvml()
    nvml.counted_w = counted_w
    assert gpu.check_energy(gpu.open_nvml(nvml), sleep=nvml.run).status == status


def test_machine_without_nvml_is_said_to_have_no_gpu():
    nvml = FakeNvml()

    def fail() -> None:
        raise nvml.NVMLError("Library Not Found")

    nvml.nvmlInit = fail
    found = gpu.open_nvml(nvml)
    assert isinstance(found, Check)
    assert found.status == "skipped"
    assert "no NVIDIA GPU (Library Not Found)" in found.value


# ---- node ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "nodes", "status"),
    [
        ([], 1, "skipped"),
        ([], 2, "warn"),
        (["4: ACTIVE", "4: ACTIVE"], 2, "ok"),
        (["4: ACTIVE", "1: DOWN"], 2, "warn"),
    ],
)
def test_infiniband_ports(states, nodes, status, tmp_path):
    for index, state in enumerate(states):
        port = tmp_path / f"mlx5_{index}" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    found = check_infiniband(nodes, tmp_path)
    assert found.status == status
    if "1: DOWN" in states:
        assert "down: mlx5_1:1" in found.value
        assert "400 Gb/sec" in found.value


def test_missing_package_and_different_nodes_fail():
    assert check_versions().status == "ok"
    assert "missing: no-such-package" in check_versions(["no-such-package"]).value
    assert check_same("versions", ["a", "a"]).status == "ok"
    found = check_same("versions", ["a", "b", "a"])
    assert found.status == "fail"
    assert "node 1: b" in found.value


def test_a_fused_dispatcher_needs_its_package(monkeypatch):
    found = check_dispatcher("deepep")
    assert (found.status, found.value) == ("fail", "parallel.dispatcher=deepep: deep_ep not found")
    assert "parallel.dispatcher=hierarchical" in found.remedy
    monkeypatch.setitem(sys.modules, "deep_ep", double("ElasticBuffer"))
    found = check_dispatcher("deepep")
    assert (found.status, found.value) == ("ok", "parallel.dispatcher=deepep: deep_ep 2.1.0")
    other = check_dispatcher("hybridep")
    assert (other.status, other.value) == ("fail", "parallel.dispatcher=hybridep: deep_ep not usable")
    assert "deep_ep 2.1.0 lacks HybridEPBuffer" in other.remedy
    asks = ["parallel.dispatcher=hybridep", "parallel.ep=2", "train.precision=bf16"]
    config = load_config(RECIPE, asks, world_size=None)
    report, _ = _check_node(Patient(config=config, run_dir=None, grace_s=60), 1, 1)
    assert {check.name: check.status for check in report.checks}["dispatcher"] == "fail"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("libcuda", "libcuda.so.1 was not found"),
        ("compiler", "no C compiler was found; install gcc"),
        ("CC", "CC=/nowhere/cc does not run"),
        ("headers", "has no Python.h"),
    ],
)
def test_what_triton_lacks_is_named(case, words, tmp_path, monkeypatch):
    """Triton's own driver and build fail for real; only that there is a GPU is pretended."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    active = pytest.importorskip("triton.runtime.driver").driver
    monkeypatch.setattr(driver.CudaDriver, "is_active", staticmethod(lambda: True))
    for name in ("_default", "_active"):
        monkeypatch.setattr(active, name, None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    for name in ("libcuda_dirs", "library_dirs"):
        monkeypatch.setattr(driver, name, getattr(driver, name).__wrapped__)  # without their caches
    if case != "libcuda":
        (tmp_path / "libcuda.so.1").touch()
        monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    elif torch.cuda.is_available():
        pytest.skip("this machine has libcuda")
    if case == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    if case == "CC":
        monkeypatch.setenv("CC", "/nowhere/cc")
    if case == "headers":
        monkeypatch.setattr("sysconfig.get_paths", lambda **_: {"include": str(tmp_path)})
    found = check_triton(has_gpu=True)
    assert found.status == "fail" and words in found.remedy
    assert check_triton(has_gpu=False).status == "skipped"


def test_disk_is_judged_by_the_checkpoints_of_the_run(tmp_path):
    needed = run_checkpoint_bytes(load_config(RECIPE))
    assert needed == 6_032_064 * (4 + 12)  # fp32 weights of the quick start, main copy, two moments
    assert disk.check_space(tmp_path, needed, keep=2).status == "ok"
    assert disk.check_space(tmp_path, 2**60, keep=2).status == "fail"
    most = disk.free_bytes(tmp_path)
    assert disk.check_space(tmp_path, most // 2, keep=2).status == "warn"
    assert disk.check_write_rate([1e9, 1e9], needed_bytes=10**12, grace_s=600).status == "ok"
    slow = disk.check_write_rate([1e9], needed_bytes=10**12, grace_s=600)
    assert slow.status == "warn"
    assert "1,000.0 s" in slow.value


def test_a_checkpoint_under_muon_has_one_moment_of_each_matrix():
    adamw, muon = (load_config(RECIPE, [f"optim.name={name}"]) for name in ("adamw", "muon"))
    matrices = params_of_muon(shape_of(adamw.model))
    assert run_checkpoint_bytes(adamw) - run_checkpoint_bytes(muon) == 4 * matrices


def test_a_save_needs_twelve_bytes_a_parameter_of_every_rank_on_a_host():
    needed = run_host_bytes(load_config(RECIPE))
    assert needed == 6_032_064 * 12
    found = host.check_save_memory(needed, ranks=8, total_bytes=10**9)
    assert (found.status, found.value) == ("ok", "about 0.6 GB to save from 8 rank(s), of 1.0 GB")
    found = host.check_save_memory(needed, ranks=16, total_bytes=10**9)
    assert found.status == "fail"
    assert "parallel.pp" in found.remedy
    assert host.check_save_memory(needed, ranks=1).status == "ok"


@pytest.mark.parametrize("layers", [[], [1, 3], [4, 0]])
def test_a_save_is_judged_by_the_fullest_stage(layers):
    overrides = ["parallel.pp=2", f"parallel.stage_layers={layers}"]
    config = load_plan_config(RECIPE, overrides)
    whole, split = (run_host_bytes(one) for one in (load_config(RECIPE), config))
    assert whole / 2 < split < whole
    assert split * 2 == make_plan(make_job(config, 2, find_gpu("h100")), 1).save_bytes


def test_write_rate_is_measured_and_leaves_nothing(tmp_path):
    assert 1e6 < disk.measure_write_rate(tmp_path) < 1e12
    assert list(tmp_path.iterdir()) == []


# ---- ranks -----------------------------------------------------------------------------------------------


def _checks_of_two() -> list[Check]:
    device = torch.device("cpu")
    return [
        collectives.check_all_reduce(device, None, nodes=1),
        collectives.check_all_to_all(device, None, nodes=1),
        collectives.check_clock_skew(),
    ]


def _corrupt_reduction() -> Check:
    honest = dist.all_reduce

    def corrupt(tensor: torch.Tensor, **options: object) -> None:
        honest(tensor, **options)
        if tensor.numel() > 1 and dist.get_rank() == 1:
            tensor[12345] += 1

    dist.all_reduce = corrupt
    try:
        return collectives.check_all_reduce(torch.device("cpu"), None, nodes=1)
    finally:
        dist.all_reduce = honest


def test_collectives_are_timed_and_a_corrupted_one_is_found(start_ranks):
    pool = start_ranks(2)
    for found in pool.run(_checks_of_two):
        assert [check.status for check in found] == ["ok", "ok", "ok"]
        assert "2 rank(s) on cpu" in found[0].value
    for check in pool.run(_corrupt_reduction):
        assert check.status == "fail"
        assert "wrong on 1 of 2" in check.value


# ---- report and command ----------------------------------------------------------------------------------


def test_report_merges_nodes_and_ends_with_the_remedies():
    ok, bad = Check("nvlink", "ok", "18 links"), Check("nvlink", "fail", "17 links", "drain it")
    report = Report([NodeReport("a", [ok]), NodeReport("b", [bad]), NodeReport("c", [ok])], [])
    assert report.status == "fail"
    assert report.failed() == ["nvlink"]
    lines = report.as_table().splitlines()
    assert lines[2].split() == ["nvlink", "ok", "a,", "c", "18", "links"]
    assert lines[-1] == "fail: nvlink: drain it"
    assert json.loads(report.as_json())["nodes"][1]["checks"][0]["value"] == "17 links"
    assert worst([]) == "ok"


def doctor(*arguments: str, expect: int) -> subprocess.CompletedProcess[str]:
    argv = command("doctor", *arguments)
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_command_checks_this_machine_with_ranks_of_its_own(tmp_path: Path):
    done = doctor(str(RECIPE), "--run-dir", str(tmp_path / "run"), "--nproc", "2", "--json", expect=0)
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in [*report["nodes"][0]["checks"], *report["job"]]}
    assert report["status"] in ("ok", "warn")
    assert len(report["nodes"]) == 1
    for name in ("versions", "disk space", "write rate", "clock skew", "all-reduce", "all-to-all"):
        assert checks[name]["status"] in ("ok", "warn")
    if not torch.cuda.is_available():
        assert "no NVIDIA GPU" in checks["gpu"]["value"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the config asks for")
def test_failed_check_gives_exit_code_1(tmp_path: Path):
    arguments = (str(RECIPE), "engine.device=cuda", "--run-dir", str(tmp_path), "--nproc", "1")
    done = doctor(*arguments, expect=1)
    assert "1 check(s) failed: gpu" in done.stderr
    assert "engine.device=cuda needs one" in done.stdout
