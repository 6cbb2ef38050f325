"""The environment of the ranks: few settings, each with its reason, and nothing that was not asked for.

A submitter's shell holds keys and paths that a job on other machines has no use for, so a job gets our
settings, what the submitter has set of an allow-list, and `launch.env`; a later one replaces an earlier one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moe.errors import InputError
from moe.launch.settings import LaunchConfig

# Taken over from the submitter's shell: tuning of the communication libraries, nothing else.
ALLOWED_PREFIXES = ("NCCL_", "NVSHMEM_", "UCX_", "GLOO_", "TORCH_NCCL_")
ALLOWED_NAMES = frozenset(
    {
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "LD_LIBRARY_PATH",
        "OMP_NUM_THREADS",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "TRITON_CACHE_DIR",
    }
)
# Set by the launcher for each rank, so that no other value may reach it.
RESERVED = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSW(OR)?D|CREDENTIALS?)(_|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Setting:
    """One environment variable and why it is set."""

    name: str
    value: str
    reason: str


def own_settings(config: LaunchConfig) -> Iterator[Setting]:
    """What we set, beyond NCCL's and torch's defaults."""
    parallel, launch = config.parallel, config.launch
    if max(parallel.tp, parallel.cp) > 1 and launch.gpu.startswith("h"):
        yield Setting(
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "1",
            "Before Blackwell, Megatron's overlap of communication and compute needs kernels in issue order.",
        )
    yield Setting(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        "Experts get another number of tokens in every step, which fragments fixed segments.",
    )
    yield Setting("NCCL_DEBUG", "WARN", "Without it a broken link is a time-out with no name.")
    yield Setting(
        "NCCL_IB_TIMEOUT",
        "22",
        "4.096 us * 2^22 = 17 s a try: a link that flaps or is rerouted does not end the job (default 20).",
    )
    if launch.interface is not None:
        reason = "Ranks must meet over the network that all nodes share."
        yield Setting("NCCL_SOCKET_IFNAME", launch.interface, reason)
        yield Setting("GLOO_SOCKET_IFNAME", launch.interface, reason)


def job_environment(config: LaunchConfig, given: Mapping[str, str]) -> list[Setting]:
    """The whole environment that a job is given.

    Args:
        config: The job.
        given: The submitter's environment.

    Raises:
        InputError: launch.env has a name that cannot be one, or what looks like a secret, which would be
            readable in the job's description.
    """
    settings = {setting.name: setting for setting in own_settings(config)}
    for name in sorted(given):
        if name in ALLOWED_NAMES or (name.startswith(ALLOWED_PREFIXES) and _NAME.fullmatch(name)):
            settings[name] = Setting(name, given[name], "From the shell that launched the job.")
    for name, value in config.launch.env.items():
        _check_name(name)
        settings[name] = Setting(name, value, "From launch.env.")
    asked = given.keys() | config.launch.env.keys()
    # One setting under two names (torch's CUDAAllocatorConfig.h): ours must not outrank theirs.
    if "PYTORCH_ALLOC_CONF" in asked and "PYTORCH_CUDA_ALLOC_CONF" not in asked:
        del settings["PYTORCH_CUDA_ALLOC_CONF"]
    return list(settings.values())


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"launch.env: {name!r} is no name of an environment variable; use letters, digits and _"
        )
    if name in RESERVED:
        raise InputError(f"launch.env: {name} is set by the launcher for each rank; remove it")
    if _SECRET.search(name):
        raise InputError(
            f"launch.env: {name} looks like a secret, which anyone could read in the job's description; "
            "set it on the nodes or, on Kubernetes, from a Secret in the training runtime"
        )
