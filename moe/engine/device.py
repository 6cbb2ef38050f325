"""The device of a rank, and its job: what every engine does first."""

from __future__ import annotations

import os

import torch

from moe.errors import InputError


def choose_device(name: str) -> torch.device:
    """The device of this rank, made current.

    Args:
        name: engine.device of the config: auto, cpu or cuda.

    Raises:
        InputError: the device is absent, or would not be used.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("engine.device=cuda, but this machine has no CUDA device; use auto or cpu")
    if name == "cpu" and available:
        raise InputError(
            "engine.device=cpu on a machine with CUDA: Megatron would use it anyway; "
            "hide it with CUDA_VISIBLE_DEVICES="
        )
    if not available:
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise InputError(
            f"rank {index} of this machine has no GPU of its own: {count} visible. "
            f"Start at most {count} ranks, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device
